# Every recipe runs in the environment that scripts/setup.py makes in .venv. Variables are described in README.md.
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
ifeq ($(OS),Windows_NT)
VENV_PYTHON := .venv/Scripts/python.exe
endif

# Through the environment, so that spaces and quotes in them survive the shell.
export SHAPE APPEARANCE PROMPT CHECKPOINT SIZE PORT COMFYUI_PATH COMFYUI_PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)
	@echo
	@echo "Variables of make demo: SHAPE=a.png APPEARANCE=b.png PROMPT=text SIZE=pixels PORT=number"
	@echo "With your own ComfyUI:  COMFYUI_PATH=folder [COMFYUI_PYTHON=python] [CHECKPOINT=name.safetensors]"

setup: ## Make .venv with all that is needed (the other targets do it by themselves)
	@$(PYTHON) scripts/setup.py

demo: setup ## Compose two pictures in a real ComfyUI; the result is in demo_output/
	@$(VENV_PYTHON) -m demo.compose \
		$${SHAPE:+--shape "$$SHAPE"} $${APPEARANCE:+--appearance "$$APPEARANCE"} $${PROMPT:+--prompt "$$PROMPT"} \
		$${CHECKPOINT:+--checkpoint "$$CHECKPOINT"} $${SIZE:+--size "$$SIZE"} $${PORT:+--port "$$PORT"}

test: ## Lint, types, layers and all tests, ComfyUI's page in a browser included
	@$(PYTHON) scripts/setup.py --browser
	@$(VENV_PYTHON) scripts/check.py

clean: ## Remove everything that was made here, the environment included
	rm -rf .venv demo_output .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
