# Specmill's everyday commands. `demo`, `test`, `quick` and `lint` set up what they need; setting up twice does nothing.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup demo test quick soak soak-training scale bench bench-training learn lint lock clean

PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check
LOG := .venv/setup.log
started := $(shell date +%s)

# The torch of pyproject.toml with the label of its CPU build, which only an index or folder of CPU wheels has.
TORCH := torch==2.13.0+cpu

# pip would compile 31,000 modules on one core (150 s); the quarter that is ever imported compiles in 40 s, when `setup`
# imports it. That lasts only if Python may write bytecode, which container images often forbid.
unexport PYTHONDONTWRITEBYTECODE
IMPORTED_BY_ENGINES := vllm.v1.engine.async_llm, vllm.v1.worker.cpu_worker, vllm.model_executor.models.llama, xgrammar
IMPORTED_BY_FLOWS := prefect.server.api.server, prefect.cli, ray.train.torch, ray.dashboard.agent, deepspeed, datasets, s3fs, openai

help: ## shows this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

setup: .venv/.specmill .venv/.model ## makes .venv from the lock and converts the default model (once: minutes, 3.5 GB)
	@echo "specmill is set up ($$(($$(date +%s) - $(started))) s)."

demo: setup ## from the written policy to an aligned checkpoint and its report
	.venv/bin/specmill run specs/runs/demo.yaml

test: setup ## all tests but the soak tests; the chain runs beside the others
	.venv/bin/pytest -m "not soak" --numprocesses 2 --dist loadfile --no-loadscope-reorder

quick: setup ## the tests that start no engine and no server, under two minutes
	.venv/bin/pytest -m "not slow and not chain and not soak" --numprocesses 2

soak: setup ## the tests that take many minutes: every kill after every change, interruptions of whole runs, both doors from nothing
	.venv/bin/pytest -m soak tests/faults/test_schedules.py tests/test_fuzz.py --numprocesses 2
	.venv/bin/pytest -m "soak and not alone and not training" --ignore tests/faults/test_schedules.py --ignore tests/test_fuzz.py \
		--numprocesses 2 --dist loadfile --no-loadscope-reorder
	.venv/bin/pytest -m "soak and alone"

soak-training: setup ## the same for training: kills of the demo's model, planted rewards, rounds of SFT, DPO and RL
	.venv/bin/pytest -m "soak and training" --numprocesses 2 --dist loadfile --no-loadscope-reorder

scale: setup ## how far one driver reaches: a million prompts through fake engines, a thousand engines to feed
	.venv/bin/python tests/benchmarks/feeding.py
	.venv/bin/python tests/benchmarks/scale.py

bench: setup .venv-peers/.packages ## beside raw vLLM, ray.data.llm, curator and datatrove: one table, more than an hour on a quiet machine
	@mkdir -p build
	.venv/bin/python tests/benchmarks/report.py > build/bench.md
	for script in raw_vllm ray_data_llm peers; do .venv/bin/python tests/benchmarks/$$script.py >> build/bench.md; done
	cat build/bench.md

bench-training: setup ## SFT beside a bare DeepSpeed loop and TRL: one table; needs a quiet machine
	.venv/bin/python tests/benchmarks/training.py

learn: setup ## what SFT, DPO and RL teach the demo's model, SFT and RL with three seeds: two tables, hours; goes on where it was stopped
	@mkdir -p build
	for script in learning rl_learning; do .venv/bin/python tests/benchmarks/$$script.py --root build/learning; done

.venv-peers/.packages: tests/benchmarks/peers.lock | .venv/.packages
	.venv/bin/uv venv -q --clear --python .venv/bin/python .venv-peers
	.venv/bin/uv pip install -q --require-hashes --no-deps -r tests/benchmarks/peers.lock --python .venv-peers/bin/python
	touch $@

lint: setup ## style, types and the direction of imports
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

lock: ## writes the lock files from pyproject.toml, keeping the versions that still fit (needs uv)
	@lock() { UV_CUSTOM_COMPILE_COMMAND="make lock" uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate "$$@"; }
	lock pyproject.toml --extra cpu --extra dev --extra wandb --extra mlflow --no-emit-package torch -o requirements-cpu.lock
	printf 'pip\nsetuptools\nuv\n' | lock - -c requirements-cpu.lock -o requirements-build.lock
	lock tests/benchmarks/peers.in -o tests/benchmarks/peers.lock
	# What holds for every line (CPython on the two kinds of machine) is checked by `setup` and not said 250 times.
	sed -i -E "s/ ; python_full_version < '3.15' and implementation_name == 'cpython' and \(\(platform_machine.*/ \\\\/" requirements-*.lock tests/benchmarks/peers.lock

clean: ## removes the environments and the tools' caches; runs and the converted model stay
	rm -rf .venv .venv-peers .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build *.egg-info
	find flows tasks cluster tests -name __pycache__ -prune -exec rm -rf {} +

# Everything is installed with --no-deps: the lock is complete, and it leaves out packages that break or bloat a CPU install.
# pip installs torch, since it alone knows where the user's CPU wheels are. uv installs the rest, in half a minute instead of
# three. Where uv finds no way (a mirror or certificate that only pip is told of), pip installs the same files by their hashes:
# first without the extra index that torch may have needed and with one retry, because an index that cannot be reached costs 8 s
# of retries for each of 250 packages; then just as it is configured.
.venv/.packages: requirements-build.lock requirements-cpu.lock
	@fail() { echo "specmill: $$1" >&2; exit 1; }
	logged() { "$$@" >> $(LOG) 2>&1; }
	case "$$(uname -sm)" in "Linux x86_64" | "Linux aarch64") ;;
	  *) fail "the locked packages are for Linux on x86-64 or ARM64, this is $$(uname -sm)." ;; esac
	"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2> /dev/null ||
	  fail "needs Python 3.11 to 3.14, but \`$(PYTHON)\` is $$("$(PYTHON)" --version 2>&1 || true). Name one: make setup PYTHON=python3.12"
	echo "Setting up specmill: some minutes and 3.5 GB, once. Details: $(LOG)"
	.venv/bin/python -m pip --version > /dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	: > $(LOG)
	echo "  1/4 pip, setuptools and uv"
	logged $(PIP) install --require-hashes --no-deps --no-compile --retries 1 -r requirements-build.lock ||
	  { tail -n 5 $(LOG) >&2; fail "pip could not install pip, setuptools and uv; its last words are above."; }
	echo "  2/4 the CPU build of PyTorch"
	logged $(PIP) install --no-deps --no-compile $(TORCH) || {
	  printf 'specmill: pip finds no CPU build of PyTorch ($(TORCH)) for %s; PyPI has none. Say where one is:\n%s\n%s\n' \
	    "$$(.venv/bin/python --version)" "    PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU wheels> make setup" \
	    "    PIP_FIND_LINKS=<a folder that holds the wheel> make setup" >&2; exit 1; }
	echo "  3/4 $$(grep -c '^[a-z]' requirements-cpu.lock) locked packages (takes longest)"
	export DS_BUILD_OPS=0 # DeepSpeed: no compiled operators
	locked="install --require-hashes --no-deps --no-build-isolation -r requirements-cpu.lock"
	logged .venv/bin/uv pip $$locked --python .venv/bin/python ||
	  logged env -u PIP_EXTRA_INDEX_URL $(PIP) $$locked --no-compile --progress-bar off --retries 1 ||
	  logged $(PIP) $$locked --no-compile --progress-bar off ||
	  { tail -n 15 $(LOG) >&2; fail "pip could not install the locked packages; its last words are above. \`make setup\` goes on from here."; }
	touch $@

.venv/.specmill: .venv/.packages pyproject.toml
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable . >> $(LOG) 2>&1 || { tail -n 15 $(LOG) >&2; exit 1; }
	touch $@

.venv/.model: .venv/.packages | .venv/.specmill
	@echo "  4/4 the default model, and a first import of what engines and flows use"
	python() { .venv/bin/python -W ignore -c "$$1" >> $(LOG) 2>&1; }
	{ python "import $(IMPORTED_BY_FLOWS)" && python "import $(IMPORTED_BY_ENGINES)"; } & imports=$$! # on the other core
	ok=1
	python 'from cluster.models import resolve_model; resolve_model("default")' || ok=
	wait $$imports || ok=
	[[ $$ok ]] || { tail -n 15 $(LOG) >&2; echo "specmill: the installed packages do not work together; Python's last words are above." >&2; exit 1; }
	touch $@
