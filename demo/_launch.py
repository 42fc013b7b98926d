"""Runs ComfyUI's main.py in this process, and ends with the process that started it.

    python _launch.py path/to/ComfyUI [arguments of main.py]

The standard input is a pipe that nobody writes to. When the parent ends, however it ends, the pipe closes: this holds
on every system, also where the parent was killed and could clean up nothing. Only the standard library is used, since
the interpreter may be the user's own.
"""

import os
import runpy
import sys
import threading


def _end_with_parent() -> None:
    os.read(0, 1)  # returns at the end of the pipe; a buffered read would hold a lock at interpreter exit
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    comfyui = sys.argv.pop(1)
    script = os.path.join(comfyui, "main.py")
    sys.argv[0] = script
    sys.path[0] = comfyui
    runpy.run_path(script, run_name="__main__")
