# `make demo` and `make test` set everything up by themselves; PYTHON picks the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
# Where CPU builds of torch come from when the pip configuration does not already offer them.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN = $(VENV)/bin
ARGS ?=

.PHONY: demo test check lint setup doctor docs clean

demo: setup
	$(BIN)/python jobs/self_train.py --config self_train/tiny-cpu --run $(RUN) $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

# The quick part of `make test`, for every change: no whole job, vLLM engine or long training, and nothing is killed.
check: lint
	$(BIN)/python -m pytest -m "not (whole_job or vllm or faults)" $(ARGS)

lint: setup
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .

doctor: setup
	$(BIN)/python -m medray.commands.doctor

docs: setup
	$(BIN)/python -m medray.config.reference_page > docs/reference/config.md

setup: $(VENV)/.ready

$(VENV)/.ready: requirements/cpu.txt requirements/setup.sh pyproject.toml
	PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX) sh requirements/setup.sh && touch $@

clean:
	rm -rf $(VENV) runs
