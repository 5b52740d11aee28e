# Every target works from a fresh clone in one command. Run make in the repository root.
PYTHON ?= python3
# Used only where the base python has no torch. A GPU build that is already there is never replaced.
TORCH ?= torch==2.13.0
JOBS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
NEEDED := import filelock, jinja2, matplotlib, numpy, rich, sympy, torch, triton, typer

.PHONY: demo test lint test-gpu clean

demo: $(VENV)/run.stamp
	$(PY) -m examples.demo

test: lint
	$(PY) -m pytest -n $(JOBS) --dist worksteal

lint: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict splagen

# In place, with the python that has a GPU build of torch: nothing is installed.
test-gpu:
	$(PYTHON) -m pytest -m gpu

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A base python with torch lends it to the environment, so that a GPU build is used and not fetched again. The .pth
# file is for a base python that is an environment itself: --system-site-packages looks past it. Some systems have no
# ensurepip; there pip is lent too.
SITE := import sysconfig; site = sysconfig.get_path("purelib")
$(PY):
	if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  { $(PYTHON) -m venv --system-site-packages $(VENV) \
	    || $(PYTHON) -m venv --system-site-packages --without-pip --clear $(VENV); } \
	  && $(PYTHON) -c '$(SITE); print(f"import site; site.addsitedir({site!r})")' > $(VENV)/lender.pth \
	  && mv $(VENV)/lender.pth "$$($(PY) -c '$(SITE); print(site)')"; \
	else \
	  $(PYTHON) -m venv $(VENV); \
	fi || { rm -rf $(VENV); exit 1; }

# Enough to run from this checkout. Nothing is installed, and no network needed, where everything imports already.
$(VENV)/run.stamp: pyproject.toml | $(PY)
	$(PY) -c '$(NEEDED)' 2>/dev/null || { \
	  { $(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --quiet '$(TORCH)'; } \
	  && $(PY) -m pip install --quiet --editable '.[examples]'; \
	}
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PY) -m pip install --quiet --editable '.[dev,examples,hf]'
	touch $@
