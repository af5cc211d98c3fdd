"The shape of the code, so that it stays: how much happens in a batch, what is kept of it, and how long and wide things are"
import ast, re, sys
from pathlib import Path
import pytest
from torch import nn
from fastai.callback.core import Callback
import fastmix.all
from fastmix.mixers import MixUp
from helpers import class_dls, mk_learn, quiet_fit

package = Path(fastmix.all.__file__).parent
modules = {o.stem: o.read_text(encoding='utf-8') for o in sorted(package.glob('*.py')) if o.stem not in ('_modidx','__init__')}

class First(Callback):
    order,run_valid = -100,False
    def before_batch(self):
        self.before = dict(vars(self.learn.mix_up))
        if self.train_iter==2: sys.setprofile(self.note)
    def note(self, frame, event, arg):
        path = Path(frame.f_code.co_filename)
        if event=='call' and path.parent==package: self.calls.append((path.stem, frame.f_code.co_name))
    def before_fit(self): self.calls = []

class Last(Callback):
    order,run_valid = 100,False
    def after_batch(self):
        sys.setprofile(None)
        now = vars(self.learn.mix_up)
        self.changed = {k for k in now if now[k] is not self.first.before.get(k)}

@pytest.fixture(scope='module')
def fit(): return quiet_fit(mk_learn(class_dls(), loss_func=nn.CrossEntropyLoss(), cbs=[MixUp(.4), First(), Last()]))

def test_calls_of_one_batch(fit): assert 0 < len(fit.first.calls) <= 80

def test_one_attribute_a_batch(fit):
    "Nothing else changes on the mixer"
    assert 'record' in fit.last.changed <= {'record','ahead'}   # plans drawn ahead are of no batch

def test_names():
    "What a star import brings is what users write"
    names = fastmix.all.__all__
    assert len(names)==len(set(names)) <= 45 and all(hasattr(fastmix.all, o) for o in names)
    assert not {'blend','plain','parts','known','peaks','outline','stages','Blend','Cut','Choice'} & set(names)

def functions(text): return [o for o in ast.walk(ast.parse(text)) if isinstance(o, (ast.FunctionDef,ast.AsyncFunctionDef))]

def body_lines(f):
    "Lines of the body, without the docstring"
    body = f.body[1:] if isinstance(f.body[0], ast.Expr) and isinstance(getattr(f.body[0], 'value', None), ast.Constant) else f.body
    return body[-1].end_lineno-body[0].lineno+1 if body else 0

def test_length():
    for name,text in modules.items():
        assert text.count('\n') <= 350, name
        for f in functions(text): assert body_lines(f) <= 20, f'{name}.{f.name} has {body_lines(f)} lines'

engines = {'calls','gan','lightning','loop','soft','trainer','variants'}

def test_the_core_stays_small():
    "What all engines and variants share, without blank lines and nbdev's marks of cells"
    assert engines <= modules.keys()
    assert sum(bool(line.strip()) and line[:4]!='# %%' for name,o in modules.items() if name not in engines for line in o.splitlines()) <= 3320

def test_no_tricks():
    "No look at the stack or at memory, no hooks but behind layers, no method of fastai's replaced"
    for name,text in modules.items():
        assert not re.search(r'_getframe|data_ptr|inspect\.stack|def __\w+__\(self:Learner', text), name
        assert 'register_forward' not in text or name=='manifold', name

banned = r'''\b(pictures?|processors?|whoever|learnt|by heart|told(?! apart)|hand on|network is fed|can not|beside the batch|shares? of the (image|training|samples))'''

def test_the_words_of_the_field():
    for name,text in modules.items():
        found = re.search(banned, text, re.IGNORECASE)
        assert not found, f'{name} says {found[0]!r}'
