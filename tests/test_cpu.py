"Mixing in a CPU's memory: the values of the definition, whatever the layout, in memory that nobody holds"
import gc, subprocess, sys, weakref
from functools import partial
import numpy as np, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.torch_core import TensorImage
from fastmix import _cpu
from fastmix._cpu import fast_blend, fast_paste, new_memory
from fastmix.core import draw_lam, draw_partners
from fastmix.mixers import MixUp
from fastmix.plan import Plan
from fastmix.regions import Boxes, Mask, draw_boxes
from helpers import mk_dls, mk_learn, quiet_fit

rng = np.random.default_rng(0)
layouts = dict(plain=lambda x: x, channels_last=lambda x: x.to(memory_format=torch.channels_last), transposed=lambda x: x.transpose(2, 3),
    batch_inside=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), strided=lambda x: x[..., ::2], expanded=lambda x: x[:, :1].expand(x.shape))
dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

@pytest.mark.parametrize('layout', layouts)
@pytest.mark.parametrize('size', [(3,3,4,6), (64,3,40,44), (3,3,160,200)], ids=['small','narrow','wide'])
def test_mixing_in_one_pass(size, layout):
    "New memory, of the same strides as a plain operation's; each sample by hand"
    for dtype in dtypes:
        x = layouts[layout](torch.rand(size).to(dtype))
        kept,idx = x.clone(),draw_partners(len(x), rng)
        for lam in draw_lam(len(x), 1., rng, fold=False), torch.tensor([.7]):
            blended,w = Plan.of(idx, lam).mix(x),lam.double()[:,None,None,None]
            want = w*x.double() + (1-w)*x.double()[idx]
            assert ((blended.double()-want).abs() <= .51*torch.finfo(dtype).eps*want + 2e-7*(dtype!=torch.float64) + 1e-15).all()
            assert blended.dtype==dtype and (layout in ('batch_inside','expanded') or blended.stride()==torch.empty_like(x).stride())
        boxes = Boxes(draw_boxes(draw_lam(len(x), 1., rng), x.shape[2:], rng), x.shape[2:])
        for region in boxes, Mask(boxes.mask, boxes.size):
            cut = Plan.of(idx, region=region).mix(x)
            want = x.clone()
            for i,((a,b),(c,d)) in enumerate(boxes.where): want[i,:,a:c,b:d] = x[idx[i],:,a:c,b:d]
            assert cut.equal(want) and cut.stride()==blended.stride()
        assert x.equal(kept) and len({o.untyped_storage().data_ptr() for o in (x, blended, cut)})==3

def test_memory_is_lent_once():
    "As long as a view, an array or autograd holds it, and no longer"
    x,plan = torch.rand(4, 3, 200, 200), Plan.of(torch.tensor([1,2,3,0]), torch.rand(4))
    want = plan.mix(x).clone()
    w = torch.ones(1, requires_grad=True)
    holders = [plan.mix(x)[2:,0], plan.mix(x).numpy(), plan.mix(x)*w, plan.mix(x).detach(), plan.mix(x).view(-1)]
    copies = [torch.as_tensor(o).detach().clone() for o in holders]
    for _ in range(4): plan.mix(torch.zeros_like(x))
    assert all(torch.as_tensor(o).detach().equal(c) for o,c in zip(holders, copies))
    holders[2].sum().backward()
    torch.testing.assert_close(w.grad, want.sum()[None])
    place = plan.mix(x).data_ptr()
    assert plan.mix(x).data_ptr()==place

class Mixes(Callback):
    "Mix something else in each batch"
    order,run_valid = 50,False
    def __init__(self, mix): self.mix = mix
    def after_pred(self): self.mix()

class Blocks(Callback):
    "Blocks of memory that lie spare while the model runs"
    order,run_valid = 100,False
    def before_fit(self): self.found = []
    def after_pred(self): self.found += map(weakref.ref, _cpu._spare[0])

def test_no_memory_is_kept_after_a_fit():
    _cpu.release_memory()
    x,plan = torch.rand(16, 3, 200, 200),Plan.of(torch.arange(8), torch.rand(8))
    learn = mk_learn(mk_dls([x], [torch.arange(16)%4]), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)), cbs=[MixUp(.4), Blocks()])
    learn.add_cb(Mixes(partial(plan.mix, x[:8])))
    quiet_fit(learn)
    gc.collect()
    assert learn.blocks.found and not any(o() is not None for o in learn.blocks.found) and not _cpu._spare[0]

def test_memory_is_not_lent_again_at_exit():
    "Where finalizers run though their objects live on"
    code = """import atexit
@atexit.register
def last(): mix(2.); print(held.min().item(), held.max().item())
import torch; from fastmix.mixers import MixUp
from fastmix.plan import Plan
def mix(v): return Plan.of(torch.tensor([1,0]), torch.full((2,), .5)).mix(torch.full((2,3,300,300), v))
held = mix(1.)"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()==['1.0','1.0']

def test_new_memory():
    "In the class and format of `x`, for fewer rows or more"
    x = TensorImage(torch.rand(4, 3, 5, 6)).contiguous(memory_format=torch.channels_last)
    x.note = 'kept'
    for bs in 2,4,9:
        res = new_memory(x, bs)
        assert type(res) is TensorImage and res.note=='kept' and res.shape==(bs,3,5,6) and res.stride()==x.stride() and res.dtype==x.dtype

def test_where_there_is_no_fast_way():
    x,pairs,weights = torch.rand(3, 8),torch.tensor([[0,1],[1,2],[2,0]]),torch.rand(3, 2)
    assert fast_blend(x, pairs, weights) is not None
    for o in x[:0], x.double(), x.int(), x.to('meta'), x.clone().requires_grad_(): assert fast_blend(o, pairs, weights) is None
    assert fast_blend(x, pairs, weights.clone().requires_grad_()) is None
    wide = torch.rand(3, 8, dtype=torch.complex128)
    for o in x[:0], wide, x.to('meta'), x.clone().requires_grad_(): assert fast_paste(o, pairs, [(...,slice(0, 2))]*3) is None
    with torch.no_grad(): assert fast_blend(x.clone().requires_grad_(), pairs, weights) is not None

def test_a_single_sample_with_any_stride():
    "It is contiguous whatever its first stride, but the rows of two mixtures of it must not overlap"
    x = torch.randn(7, 1, 3).transpose(0, 1)
    for o in x, torch.randn(4, 7, 3)[::2][:1]:
        twice = Plan(torch.zeros(2, 2, dtype=torch.long), torch.tensor([[1.,0.],[.5,.5]]), n=1).mix(o)
        assert twice.equal(o.expand(2, -1, -1))
