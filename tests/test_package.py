"What `pip install fastmix` brings: everything it needs, and nothing of what only developers have"
import re, subprocess, sys, zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest

uv = Path(sys.executable).with_name('uv')

def run(*args, **kw):
    "Run a command and return what it prints"
    res = subprocess.run([str(o) for o in args], capture_output=True, text=True, **kw)
    assert res.returncode==0, f'{args} failed:\n{res.stdout}{res.stderr}'
    return res.stdout

@pytest.fixture(scope='module')
def wheel(root, tmp_path_factory):
    "A wheel built from an sdist"
    out = tmp_path_factory.mktemp('dist')
    run(uv, 'build', '--out-dir', out, root)
    assert list(out.glob('*.tar.gz'))
    return next(out.glob('*.whl'))

def test_modules(wheel, root):
    have = {o for o in zipfile.ZipFile(wheel).namelist() if o.endswith('.py')}
    assert have == {o.relative_to(root).as_posix() for o in (root/'fastmix').rglob('*.py')}

def test_metadata(wheel, root):
    import fastmix
    zf = zipfile.ZipFile(wheel)
    meta = message_from_string(zf.read(next(o for o in zf.namelist() if o.endswith('METADATA'))).decode())
    assert (meta['Name'], meta['Version'], meta['License-Expression']) == ('fastmix', fastmix.__version__, 'Apache-2.0')
    assert meta.get_payload().strip() == (root/'README.md').read_text(encoding='utf-8').strip()
    settings = ConfigParser()
    settings.read(root/'settings.ini', encoding='utf-8')
    needs = [o for o in meta.get_all('Requires-Dist') if 'extra ==' not in o]
    assert sorted(needs) == sorted(settings['DEFAULT']['requirements'].split())
    assert {f'{o}_requirements' for o in meta.get_all('Provides-Extra')} == settings['DEFAULT'].keys() - {'requirements'}

# What is run in an environment that has no extras
without_extras = '''
import fastmix, pkgutil, sys
extras = dict(lightning='lightning', trainer='transformers accelerate')
from importlib import import_module
from importlib.metadata import version
for m in pkgutil.iter_modules(fastmix.__path__):
    try: import_module(f'fastmix.{m.name}')
    except ImportError as e: assert 'pip install ' + extras[m.name] in str(e), (m.name,e)
    else: assert m.name not in extras
assert not {'lightning','transformers','tensorboard','wandb','torchmetrics','timm','accelerate'} & sys.modules.keys()
from fastmix.log import _open_writer
try: _open_writer(None)
except ImportError as e: assert 'pip install tensorboard' in str(e)
else: assert False
print(fastmix.__file__, version('fastmix'))
'''

def test_install(wheel, root, tmp_path):
    "The wheel alone, in an environment of its own, imported from elsewhere: all but `fastmix.lightning` and `fastmix.trainer` work without extras"
    env = tmp_path/'env'
    python = env/('Scripts/python.exe' if sys.platform=='win32' else 'bin/python')
    run(uv, 'venv', '--python', sys.executable, env)
    run(uv, 'pip', 'install', '--python', python, '--constraint', root/'constraints.txt', wheel)
    file,version = run(python, '-I', '-c', without_extras, cwd=tmp_path).split()
    import fastmix
    assert Path(file).is_relative_to(env.resolve()) and version==fastmix.__version__

def test_the_readme_is_short_and_its_images_are_described(root):
    text = (root/'README.md').read_text(encoding='utf-8')
    assert len(text.split())<=700
    alts = re.findall(r'!\[(.*?)\]\((.*?)\)', text)
    assert len(alts)==2 and all(len(alt.split())>10 and (root/path).exists() for alt,path in alts)
    assert '<script' not in text
