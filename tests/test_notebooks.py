"The outputs that notebooks keep"
import json
from pathlib import Path

import pytest

nbs = Path(__file__).parent.parent/'nbs'

@pytest.mark.parametrize('nb', [o.relative_to(nbs).as_posix() for o in sorted(nbs.rglob('[!._]*.ipynb')) if '.ipynb_checkpoints' not in o.parts])
def test_outputs(nb, root):
    outs = [o for c in json.loads((nbs/nb).read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', [])]
    assert not [o for o in outs if o['output_type']=='error' or o.get('name')=='stderr'], f'{nb} keeps errors or warnings'
    assert not any(o in json.dumps(outs) for o in (str(root), str(Path.home()), 'site-packages')), f'{nb} shows a path of the machine that ran it'
