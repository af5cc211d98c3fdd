# Needs Python 3.10 or newer (with venv) and make. Everything else comes into .venv, in the versions of constraints.txt.
SHELL := /bin/bash
python ?= python3
bin := .venv/bin
env := .venv/.dev
# What export, clean and the README may rewrite
sources := fastmix nbs README.md $(wildcard index_files)
sums = find $(sources) -type f ! -path '*/.*' ! -path '*/__pycache__/*' | sort | xargs cksum
say = { echo "make $@: $(1)" >&2; exit 1; }

# Notebooks run side by side: a thread pool for each would only make them wait for one another
docs evidence test: export OMP_NUM_THREADS = 1

help: ## Show this list
	@sed -n 's/^\([.a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8

.venv: $(env) ## Make the environment
# .venv/.NAME: fastmix with its extra NAME is installed
.venv/.%: pyproject.toml settings.ini setup.py constraints.txt
	@echo "make: installing fastmix[$*] and what it needs into .venv, some minutes of download the first time"
	$(python) -m venv .venv
	$(bin)/pip install --quiet --constraint constraints.txt uv
	$(bin)/uv pip install --quiet --python $(bin)/python --constraint constraints.txt --editable '.[$*]'
	@# nbdev 3 says nbdev-test where nbdev 2 said nbdev_test: both work here
	for f in $$(compgen -G '$(bin)/nbdev-*'); do ln -sf $${f##*/} $(bin)/$$(tr - _ <<< $${f##*/}); done
	touch $@

demo: .venv/.metrics ## Train on real digits with and without MixUp, in two minutes; ARGS='--mixer cutmix'
	$(bin)/python -W ignore -m fastmix.lab.demo $(ARGS)

bench: $(env) ## Measure what mixing adds to a batch, beside fastai, timm and torchvision
	$(bin)/python -W ignore -m fastmix.lab.bench $(ARGS)

evidence: $(env) ## Run all experiments anew in evidence/, in about fifteen hours on two cores, and go on if interrupted; GPU=1 adds the paper's network
	mkdir -p evidence
	cp $$(grep -l run_missing nbs/tutorials/*.ipynb) nbs/tutorials/evidence.ipynb evidence
	$(if $(GPU),for noise in 0 .2 .5 .8; do $(bin)/python -m fastmix.lab.scale --noise $$noise --out evidence/runs/scale.csv $(ARGS) || exit; done)
	$(bin)/nbdev-test evidence --skip-file-re '^evidence' --flags slow --cell-timeout 0 --n-workers 2 --timing --save
	$(bin)/nbdev-test evidence/evidence.ipynb --save

sync: $(env) ## Notebooks to modules and README
	$(bin)/nbdev-export
	$(bin)/nbdev-clean
	$(bin)/python nbs/_build.py readme

docs: $(env) ## Build the site into _docs
	$(bin)/python nbs/_build.py docs

# What the checks need and PyPI does not have: a browser, and Fashion-MNIST, for which a small sample can stand in
sample := $(CURDIR)/.venv/fashion-mnist
test: export FASHION_MNIST = $(sample)
debian := chromium dataset-fashion-mnist
debian:
	@dpkg -s $(debian) >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(debian); } \
		|| echo "make: $(debian) are not installed, which only root on Debian can do" >&2
	@{ compgen -G '/usr/share/datasets/fashion-mnist/t10k*' || compgen -G "$$HOME/.fastai/data/FashionMNIST/raw/t10k*"; } >/dev/null && rm -rf $(sample) \
		|| { echo 'make: without Fashion-MNIST, experiments are tried on 400 of its images'; $(python) tests/fashion_sample.py $(sample); }

test: $(env) debian ## Run all checks, in about eight minutes on two cores
	@echo 'make test: notebooks, tests, a wheel in an empty environment and the site in a browser, about eight minutes on two cores'
	@$(sums) > .venv/sums
	$(MAKE) sync
	@$(sums) | diff .venv/sums - || $(call say,notebooks and modules and README were out of step. They agree now: look at the files above and commit them)
	@$(bin)/chkstyle fastmix nbs tests setup.py || $(call say,follow the hints of chkstyle above)
	@$(bin)/nbdev-test --timing || $(call say,open the notebook above and run it from the top)
	@$(bin)/pytest -n auto --dist loadfile || $(call say,run the test above alone: $(bin)/pytest -k NAME)

lock: $(env) ## Take the newest versions into constraints.txt
	$(bin)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --all-extras --no-header --no-annotate pyproject.toml -o constraints.txt

clean: ## Remove what can be made again
	rm -rf .venv .pytest_cache .hypothesis *.egg-info build dist _docs _proc
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help .venv demo bench evidence sync docs debian test lock clean
