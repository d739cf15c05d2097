# Every target works on a fresh machine with Python 3.11 or later and pip: the first one makes .venv.
PYTHON ?= python3
BIN := .venv/bin

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
.PHONY: demo test drills lint docs export bench clean

# torch comes first and pinned: the registry's newest one would bring gigabytes of CUDA.
# HASHES=1 (Linux, x86-64, Python 3.11) accepts only files with the hashes of requirements/ci.txt,
# except for torch, whose builds differ between registries.
.venv/ready: pyproject.toml constraints.txt requirements/ci.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifdef HASHES
	$(PIP) --require-hashes --no-deps --only-binary :all: -r requirements/ci.txt
	$(PIP) -c constraints.txt torch
	$(PIP) --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
else
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev]'
endif
	touch $@

demo: .venv/ready
	$(BIN)/python examples/stereo_demo.py --output demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Signals, full disks, damaged files and the like with full numbers: half an hour or more. The test
# suite runs a short form. Drills of full disks need the right to mount a tmpfs.
drills: .venv/ready
	DRILLS=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/drills

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The documentation site: build/docs/index.html. Warnings are errors; nothing is downloaded. It embeds
# the page that matches two photographs if `tiepoints serve` has downloaded what that needs.
docs: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs

# The ONNX files of a release (docs/how-to/export.md) with their sizes and checksums.
export: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/export_files.py --output build/export

# OXFORD: a folder with the sequences graf, boat, bikes and leuven (PNG images 1..6 and H_1_k)
OXFORD ?= ../shared/data/oxford
bench: .venv/ready
	$(BIN)/python benchmarks/repeatability.py $(OXFORD) --out benchmarks/results/repeatability.json
	$(BIN)/python benchmarks/bias.py $(OXFORD) --out benchmarks/results/bias.json
	$(BIN)/python benchmarks/speed.py --out benchmarks/results/speed.json
	$(BIN)/python benchmarks/realtime.py --out benchmarks/results/realtime.json
	$(BIN)/python benchmarks/rekd.py $(OXFORD) --work build/rekd --speed --out benchmarks/results/rekd.json --table benchmarks/results/rekd.md
	$(BIN)/python benchmarks/oxford.py $(OXFORD) --work build/oxford --out benchmarks/results/oxford.json --table benchmarks/results/oxford.md

clean:
	rm -rf .venv build demo
