# Needs Python 3.10 or newer (with venv) and make. All else is installed into .venv, in the versions of constraints.txt.
SHELL := /bin/bash
python ?= python3
bin := .venv/bin
env := .venv/.dev
# Files that export, clean and the README may rewrite
sources := fastmix nbs README.md $(wildcard index_files)
sums = find $(sources) -type f ! -path '*/.*' ! -path '*/__pycache__/*' | sort | xargs cksum
say = { echo "make $@: $(1)" >&2; exit 1; }

# Notebooks run in parallel, and a thread pool for each would only make them wait for one another
docs evidence test: export OMP_NUM_THREADS = 1

help: ## Show this list
	@sed -n 's/^\([.a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8

.venv: $(env) ## Make the environment
# .venv/.NAME: fastmix with its extra NAME is installed
.venv/.%: pyproject.toml settings.ini setup.py constraints.txt
	@echo "make: installing fastmix[$*] and its dependencies into .venv; the first download takes some minutes"
	$(python) -m venv .venv
	$(bin)/pip install --quiet --constraint constraints.txt uv
	$(bin)/uv pip install --quiet --python $(bin)/python --constraint constraints.txt --editable '.[$*]'
	@# nbdev 3 has nbdev-test, and nbdev 2 had nbdev_test: both names work here
	for f in $$(compgen -G '$(bin)/nbdev-*'); do ln -sf $${f##*/} $(bin)/$$(tr - _ <<< $${f##*/}); done
	touch $@

demo: .venv/.metrics ## Train on real digits with and without MixUp, in two minutes; for CutMix: ARGS='--mixer cutmix'
	$(bin)/python -W ignore -m fastmix.lab.demo $(ARGS)

bench: $(env) ## Measure what mixing adds to a batch, compared with fastai, timm and torchvision
	$(bin)/python -W ignore -m fastmix.lab.bench $(ARGS)

evidence: $(env) ## Run all experiments again in evidence/, in about seventeen hours on two cores; resumes if interrupted; GPU=1 adds the paper's model
	mkdir -p evidence
	cp $$(grep -l run_missing nbs/tutorials/*.ipynb) nbs/tutorials/evidence.ipynb evidence
	$(if $(GPU),for noise in 0 .2 .5 .8; do $(bin)/python -m fastmix.lab.scale --noise $$noise --out evidence/runs/scale.csv $(ARGS) || exit; done)
	$(bin)/nbdev-test evidence --skip-file-re '^evidence' --flags slow --cell-timeout 0 --n-workers 2 --timing --save
	$(bin)/nbdev-test evidence/evidence.ipynb --save

sync: $(env) ## Export the notebooks to modules and README
	$(bin)/nbdev-export
	$(bin)/nbdev-clean
	$(bin)/python nbs/_build.py readme

docs: $(env) ## Build the site into _docs
	$(bin)/python nbs/_build.py docs

# The checks need two things that PyPI does not have: a browser, and Fashion-MNIST, which a small sample can replace
sample := $(CURDIR)/.venv/fashion-mnist
test: export FASHION_MNIST = $(sample)
debian := chromium dataset-fashion-mnist
debian:
	@dpkg -s $(debian) >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(debian); } \
		|| echo "make: $(debian) are not installed; only root on Debian can install them" >&2
	@{ compgen -G '/usr/share/datasets/fashion-mnist/t10k*' || compgen -G "$$HOME/.fastai/data/FashionMNIST/raw/t10k*"; } >/dev/null && rm -rf $(sample) \
		|| { echo 'make: Fashion-MNIST is not installed, so experiments are tried on 400 of its images'; $(python) tests/fashion_sample.py $(sample); }

test: $(env) debian ## Run all checks, in about eight minutes on two cores
	@echo 'make test: notebooks, tests, a wheel in an empty environment and the site in a browser, about eight minutes on two cores'
	@$(sums) > .venv/sums
	$(MAKE) sync
	@$(sums) | diff .venv/sums - || $(call say,the modules or the README did not match the notebooks. They match now: check the files above and commit them)
	@$(bin)/chkstyle fastmix nbs tests setup.py || $(call say,follow the hints of chkstyle above)
	@$(bin)/nbdev-test --timing || $(call say,open the notebook named above and run it from the top)
	@$(bin)/pytest -n auto --dist loadfile || $(call say,run the failed test alone: $(bin)/pytest -k NAME)

lock: $(env) ## Write the newest versions to constraints.txt
	$(bin)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --all-extras --no-header --no-annotate pyproject.toml -o constraints.txt

clean: ## Remove all files that can be made again
	rm -rf .venv .pytest_cache .hypothesis *.egg-info build dist _docs _proc
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help .venv demo bench evidence sync docs debian test lock clean
