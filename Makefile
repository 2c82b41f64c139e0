# make demo   set everything up, train on the built-in shapes, evaluate, write pictures
# make test   set everything up and pass the tests
# make slow   the tests that take minutes;   make lint   ruff and mypy
# make extras the tests of what needs heavy libraries, in an environment of its own with nrtk-albumentations
# make docs   the documentation as a site in site/
# make bench  speed and memory on this machine;   make bench-gpu   all that is to be measured where there is a GPU
# make chaos  kill runs anywhere, fill their disks, stop them: hours; ARGS='kills=50 --seed 1'
PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto # processes that run tests side by side
RUN = $(VENV)/bin/python
RUN_EXTRAS = $(VENV)-extras/bin/python

.PHONY: demo test slow extras docs lint bench bench-gpu chaos clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

# What both environments hold is linked, not installed twice: torch with CUDA takes 6 GB.
$(VENV)-extras/.installed: $(VENV)/.installed
	$(RUN) -m venv --clear --without-pip $(VENV)-extras
	cp -RPpl $(VENV)/lib/. $(VENV)-extras/lib
	cp -l $(VENV)/bin/ruff $(VENV)-extras/bin/
	$(RUN_EXTRAS) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,docs,geo,hub,optuna,ray,shards,tables]" "moto[s3]" flask flask-cors captum
	$(RUN_EXTRAS) -m pip uninstall --quiet --yes albumentations albucore
	$(RUN_EXTRAS) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt nrtk-albumentations
	touch $@

demo: $(VENV)/.installed
	rm -rf demo
	$(RUN) scripts/train.py experiment=demo hydra.run.dir=demo
	$(RUN) scripts/evaluate.py demo/best.ckpt --out demo --masks demo/masks --pictures demo/pictures
	@echo
	@echo "Look at demo/report.html; pictures are in demo/pictures, scores in demo/report.json, demo/metrics.csv."

test: $(VENV)/.installed
	$(RUN) -m pytest -q -n $(JOBS)

slow: $(VENV)/.installed
	$(RUN) -m pytest -q -n $(JOBS) -m slow --durations 20

extras: $(VENV)-extras/.installed
	$(RUN_EXTRAS) -m pytest -q -n $(JOBS) -m extras
	$(RUN_EXTRAS) -m pytest -q -n $(JOBS) tests/data/test_augmentation.py

docs: $(VENV)-extras/.installed
	NO_MKDOCS_2_WARNING=1 $(RUN_EXTRAS) -m mkdocs build --quiet --strict

chaos: $(VENV)/.installed
	$(RUN) tests/chaos.py $(ARGS)

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/.installed
	$(RUN) scripts/benchmark.py speed int8 many memory growth input

# In steps of less than nine minutes: what is finished is kept, and the same command goes on with the rest.
bench-gpu: benchmark-gpu/tests-kernels.txt benchmark-gpu/tests-compilation.txt
	$(RUN) scripts/benchmark.py speed many memory growth kernels input --batch 8 --repeats 20 --out benchmark-gpu \
	  --minutes 6 --resume

benchmark-gpu/tests-kernels.txt: $(VENV)/.installed
	mkdir -p benchmark-gpu
	$(RUN) -m pytest -q -n $(JOBS) -m "slow or not slow" tests/switches > $@.part || { cat $@.part; exit 1; }
	mv $@.part $@

benchmark-gpu/tests-compilation.txt: $(VENV)/.installed
	mkdir -p benchmark-gpu
	$(RUN) -m pytest -q -n $(JOBS) -m "slow or not slow" tests/models/test_compile.py > $@.part || { cat $@.part; exit 1; }
	mv $@.part $@

clean:
	rm -rf $(VENV) $(VENV)-extras demo build site *.egg-info
