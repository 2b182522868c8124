# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Every target works on a clean checkout: it makes the virtual environment and builds what it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
BENCH_ARGS ?=
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.[ch] vhost/*.h vhost/*.pyx vhost/*.pxd vhost/*/*.pyx vhost/*/*.pxd)

.PHONY: all demo test test-c test-asan test-tsan free-threaded test-free-threaded test-peers test-guest test-unit peers bench lint wheel clean system
all: $(VENV)/built

# Python's headers and ensurepip are packages of their own on Debian. liburing is wanted, not needed.
HAVE_PYTHON := $(PYTHON) -c 'import ensurepip, os, sysconfig as s, sys; \
    sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' 2>/dev/null
HAVE_LIBURING := printf '\043include <liburing.h>\n' | $(CC) -E -x c - >/dev/null 2>&1
system:
	@$(HAVE_PYTHON) && $(HAVE_LIBURING) || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv python3-dev gcc libc6-dev liburing-dev; \
	else \
	    $(HAVE_PYTHON) || { echo "pyvhost: needs the packages python3-venv, python3-dev and gcc" >&2; exit 1; }; \
	fi

$(VENV)/made: | system
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check 'setuptools>=77' 'Cython>=3.1'
	touch $@

$(VENV)/built: $(SOURCES) $(VENV)/made
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e .
	touch $@

$(VENV)/tools: $(VENV)/built
	$(BIN)/pip install -q --disable-pip-version-check build $$($(BIN)/python -c 'import tomllib; \
	    extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	    print(*extras["test"], *extras["lint"])')
	touch $@

demo: $(VENV)/built
	$(BIN)/python -m vhost demo

# What the peers' tests need; says which package is missing where it may not install.
peers: | system
	$(PYTHON) tests/install_peers.py

# In this order, for they may run side by side (make -j2 test): what takes longest comes first.
test: test-c test-asan test-tsan test-guest test-peers test-unit

# With arguments that choose tests, none of one part may be among them: pytest says 5 then.
NONE_IS_FINE = $(if $(PYTEST_ARGS),|| test $$? -eq 5)

test-unit: $(VENV)/tools
	$(BIN)/pytest -m 'not peer and not guest' $(PYTEST_ARGS) $(NONE_IS_FINE)

test-peers: $(VENV)/tools peers
	$(BIN)/pytest -m peer $(PYTEST_ARGS) $(NONE_IS_FINE)

test-guest: $(VENV)/tools peers
	$(BIN)/pytest -m guest $(PYTEST_ARGS) $(NONE_IS_FINE)

# All that needs no other program, by an interpreter without the lock, which is built for it.
FREE_THREADED := .venv-free-threaded
free-threaded: | system $(VENV)/built
	$(PYTHON) tests/install_peers.py --free-threaded
	$(MAKE) VENV=$(FREE_THREADED) PYTHON=$(or $(PYVHOST_CACHE),.cache)/python-free-threaded/bin/python3 $(FREE_THREADED)/tested

test-free-threaded: free-threaded
	PYTHON_GIL=0 $(FREE_THREADED)/bin/pytest -m 'not peer and not guest' $(PYTEST_ARGS) \
	    --deselect tests/test_packaging.py tests/test_*.py tests/devices tests/drivers

$(VENV)/tested: $(VENV)/built
	$(BIN)/pip install -q --disable-pip-version-check --prefer-binary $$($(BIN)/python -c 'import tomllib; \
	    print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["test"])')
	touch $@

test-c test-asan test-tsan: | system

test-c:
	$(MAKE) -C tests/c test

test-asan:
	$(MAKE) -C tests/c asan

test-tsan:
	$(MAKE) -C tests/c tsan

$(VENV)/bench: $(VENV)/built
	$(BIN)/pip install -q --disable-pip-version-check $$($(BIN)/python -c 'import tomllib; \
	    print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"])')
	touch $@

# BENCH_ARGS: suites and options, such as `--quick ring`.
bench: $(VENV)/bench
	-$(PYTHON) tests/install_peers.py --benchmarks
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(VENV)/tools
	$(BIN)/python -m build

clean:
	rm -rf build dist $(VENV) $(FREE_THREADED) *.egg-info tests/c/build
	rm -f vhost/*.so vhost/*/*.so vhost/*.c vhost/*/*.c
