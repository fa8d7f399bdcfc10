# `make demo` and `make test` need Python 3.11 with venv, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Threads that wait without spinning: several times faster where cores are shared.
export OMP_WAIT_POLICY := PASSIVE
unexport PYTHONDONTWRITEBYTECODE
# mkdocs-material's announcements.
export NO_MKDOCS_2_WARNING := 1

.PHONY: setup demo docs test test-gsplat clean

setup: $(VENV)/.complete

$(VENV)/.complete: requirements.lock pyproject.toml setup/torchvision_cpu.py
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and 'Python 3.11 or 3.12 is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0 torchvision==0.28.0
	$(BIN)/python -m pip install --quiet --no-deps -r requirements.lock
	$(BIN)/python setup/torchvision_cpu.py
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/python -m demo

docs: setup
	$(BIN)/mkdocs build --strict --quiet
	@echo outputs/site/index.html

test: setup docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What is asked of gsplat, and training on the CPU, against every version; fetches them, so it needs a network.
test-gsplat: setup
	set -e; for version in 1.4.0 1.5.0 1.5.1 1.5.2 1.5.3; do \
		$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/gsplat/$$version gsplat==$$version; \
		PYTHONPATH=build/gsplat/$$version OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fit3d_ns/rasterization/test_gsplat.py \
			tests/fit3d_ns/test_training.py tests/fit3d_ns/rasterization/test_rasterization_forward.py; \
	done

clean:
	rm -rf $(VENV) outputs build *.egg-info
