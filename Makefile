PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup quickstart demo test test-slow faults lint bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## Make .venv with everything (CPU; for a GPU see README)

$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,offline,export,milvus,serve,dev]'
	touch $@

quickstart: setup ## The main job on real pictures, without network: table, picture, checkpoint
	$(BIN)/python benchmark/run.py

demo: setup ## A page to upload pictures, see why, and teach; opens at http://127.0.0.1:7860
	$(BIN)/python -m hf_knn_space

test: lint ## Lint and all fast tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: setup ## Tests that take minutes; a run that was stopped goes on
	$(BIN)/python -m pytest -m slow --timeout 3600 -n auto --dist loadfile --record=outputs/long-tests/slow

faults: setup ## Kills, mutated files, long property runs; likewise
	$(BIN)/python -m pytest -m faults --timeout 7200 -n auto --dist loadfile --record=outputs/long-tests/faults

lint: setup ## ruff (lint and format), mypy and the import contracts
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo

bench: setup ## Speed against named peers, as ratios: benchmark/speed/SPEED.md, 15 minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,onnx,openvino]'
	$(BIN)/python benchmark/speed/run_all.py

clean: ## Remove .venv and what the runs wrote
	rm -rf .venv outputs
