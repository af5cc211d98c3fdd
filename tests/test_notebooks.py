"The outputs that notebooks keep, and the commands that they name"
import json, re, shlex
from importlib import import_module
from pathlib import Path

import pytest
from fastcore.script import anno_parser

nbs = Path(__file__).parent.parent/'nbs'

@pytest.mark.parametrize('nb', [o.relative_to(nbs).as_posix() for o in sorted(nbs.rglob('[!._]*.ipynb')) if '.ipynb_checkpoints' not in o.parts])
def test_outputs(nb, root):
    outs = [o for c in json.loads((nbs/nb).read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', [])]
    assert not [o for o in outs if o['output_type']=='error' or o.get('name')=='stderr'], f'{nb} keeps errors or warnings'
    assert not any(o in json.dumps(outs) for o in (str(root), str(Path.home()), 'site-packages')), f'{nb} shows a path of the machine that ran it'

def test_commands_have_the_options_that_pages_name():
    sources = [''.join(c['source']) for o in sorted(nbs.rglob('[!._]*.ipynb')) for c in json.loads(o.read_text(encoding='utf-8'))['cells']]
    found = [o for source in sources for o in re.findall(r'python -m fastmix\.lab\.(\w+)([^`\n]*)', source)]
    assert {module for module,_ in found}=={'demo','bench','scale'}
    for module,args in found: anno_parser(getattr(import_module(f'fastmix.lab.{module}'), module)).parse_args(shlex.split(args))

def test_the_example_of_contributing(root):
    "The mixer that it adds works, and its test passes"
    mixer,test = (o.split('```')[0] for o in (root/'CONTRIBUTING.md').read_text(encoding='utf-8').split('```python')[1:])
    names = {}
    exec('import pytest, torch\nfrom fastcore.meta import delegates\nfrom fastmix.all import *\nfrom fastmix.check import check_losses', names)
    exec(mixer+test, names)
    for kind in names['check_losses']: names['test_bands'](kind)
