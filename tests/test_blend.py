"The weighted mean of two samples, or more"
import numpy as np, pytest, torch
from fastai.torch_core import TensorImage
from torch.testing import assert_close
from fastmix.blend import blend, blend_rows
from fastmix.core import draw_partners, draw_weights, unsqueeze_as
from helpers import name_of

rng = np.random.default_rng(0)
kinds = [(4,6), (1024,3,16,16), (4,3,200,200)]

def pairs_of(n, k=2): return torch.stack([torch.arange(n), *(draw_partners(n, rng) for _ in range(k-1))], 1)

def mean_of(x, pairs, weights):
    "Row by row, in double precision"
    return torch.stack([sum(w*x[j].double() for w,j in zip(ws, js)) for ws,js in zip(weights.expand(pairs.shape).double(), pairs)])

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8], ids=name_of)
def test_blend_rounds_once(dtype):
    x,x1 = (torch.rand(2, 8, 3, 9)*200).to(dtype)
    lam = torch.rand(8)
    want = lam.double()[:,None,None]*x.double() + (1-lam.double()[:,None,None])*x1.double()
    got = blend(x, x1, lam)
    assert got.dtype==dtype and blend(x, x1, torch.ones(1)).equal(x)
    ulp = .5 if dtype==torch.uint8 else 200*torch.finfo(dtype).eps
    assert (got.double()-want).abs().max() <= ulp*1.01 + 1e-4

@pytest.mark.parametrize('k', [2, 4])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8], ids=name_of)
def test_the_mixture(dtype, k):
    "One or all weights, any layout, with gradients or without: the same, in new memory"
    for shape in (8,1,1), (8,3,5,4), (600,3,12,12), (6,3,180,180):
        x = (torch.rand(shape)*200).to(dtype)
        pairs,kept = pairs_of(len(x), k),x.clone()
        layouts = [x] + ([x.contiguous(memory_format=torch.channels_last)] if x.ndim==4 else [])
        layouts += [x.clone().requires_grad_()] if x.is_floating_point() else []
        near = dict(rtol=2*torch.finfo(dtype).eps, atol=1e-5) if x.is_floating_point() else dict(rtol=0, atol=.51)
        for weights in draw_weights(len(x), 1., k, rng), draw_weights(1, 1., k, rng):
            want = mean_of(x, pairs, weights)
            for o in layouts:
                got = blend_rows(o, pairs, weights)
                assert got.dtype==dtype and got.stride()==o.stride() and got is not o and x.equal(kept)
                assert_close(got.double(), want, **near)

def test_rows_in_any_order_and_partners_after_the_batch():
    for x in torch.rand(7, 3, 4), torch.rand(7, 3, 4).double():   # by the fast way, and the plain one
        weights = draw_weights(4, 1., 2, rng)
        for pairs,in_order in (torch.tensor([[0,5],[1,6],[2,4],[3,5]]),True), (torch.tensor([[6,5],[1,1],[2,4],[2,0]]),False):
            assert_close(blend_rows(x, pairs, weights, in_order).double(), mean_of(x, pairs, weights), rtol=1e-6, atol=1e-6)

@pytest.mark.parametrize('size', kinds, ids=['small','narrow','wide'])
def test_autocast_changes_nothing(size):
    pairs,weights = pairs_of(size[0]),torch.tensor([[.7,.3]])
    for dtype in torch.bfloat16,torch.float16,torch.float32:
        x = torch.rand(size).to(dtype)
        with torch.autocast('cpu', dtype=torch.bfloat16): got = blend_rows(x, pairs, weights)
        assert got.dtype==dtype and got.equal(blend_rows(x, pairs, weights))

@pytest.mark.parametrize('size', kinds, ids=['small','narrow','wide'])
def test_any_float_is_a_lam(size):
    "Also one in double precision"
    x,pairs,lam = torch.rand(size),pairs_of(size[0]),torch.rand(size[0], dtype=torch.float64)
    x1,w = x[pairs[:,1]],unsqueeze_as(lam, x)
    assert_close(blend_rows(x, pairs, torch.stack([lam, 1-lam], 1)), (w*x + (1-w)*x1).float())
    lam.requires_grad_()
    blend_rows(x, pairs, torch.stack([lam, 1-lam], 1)).sum().backward()
    assert_close(lam.grad, (x-x1).flatten(1).sum(1).double(), rtol=1e-3, atol=1e-3)

def test_gradients_flow_to_both():
    x,lam = torch.rand(4, 3, 8, 8, requires_grad=True),torch.tensor([.9,.8,.7,.6])
    blend_rows(x, torch.tensor([[0,1],[1,2],[2,3],[3,0]]), torch.stack([lam, 1-lam], 1)).sum().backward()
    assert_close(x.grad[:,0,0,0], torch.tensor([.9+.4, .8+.1, .7+.2, .6+.3]))

@pytest.mark.parametrize('x', [torch.arange(4), torch.zeros(4, 9).byte(), torch.zeros(4, 2, 3, 3).int(), torch.zeros(4, 3).bool()], ids=lambda o: str(o.dtype))
def test_what_has_no_mean_is_refused(x):
    for f in (lambda: blend(x, x, torch.rand(4))), (lambda: blend_rows(x, pairs_of(4), torch.rand(4, 2))), \
            (lambda: blend_rows(x, pairs_of(4, 3), torch.rand(4, 3))):
        with pytest.raises(TypeError, match='cannot be averaged') as e: f()
        assert str(tuple(x.shape)) in str(e.value) and str(x.dtype) in str(e.value)

def test_class_and_format_survive():
    x = TensorImage(torch.rand(6, 3, 8, 10)).contiguous(memory_format=torch.channels_last)
    for got in blend(x, x.flip(0), torch.rand(6)), blend_rows(x, pairs_of(6), torch.rand(6, 2)), blend_rows(x.double(), pairs_of(6, 3), torch.rand(6, 3)):
        assert type(got) is TensorImage and got.stride()==x.stride()
