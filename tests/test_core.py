"Properties of λ, partners, blends and boxes, over many draws"
import math, pickle, subprocess, sys
import numpy as np, pytest, scipy.stats, torch
from hypothesis import given, settings, strategies as st
from fastmix.core import BlendPlan, CutPlan, blend, box_mask, draw_boxes, draw_lam, draw_partners, unsqueeze_as
from fastmix.mixes import Blend, Choice, Cut, Mix

rng = np.random.default_rng(0)
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)

@pytest.mark.parametrize('alpha', [.1, .4, 1., 8.])
def test_lam_is_beta(alpha):
    "In twenty bins, folded or not, as SciPy's distribution function says"
    n,edges = 20_000, np.linspace(0, 1, 21)
    want = n*np.diff(scipy.stats.beta(alpha, alpha).cdf(edges))
    assert scipy.stats.chisquare(np.histogram(draw_lam(n, alpha, rng, fold=False), edges)[0], want).pvalue > 1e-3
    assert scipy.stats.chisquare(np.histogram(draw_lam(n, alpha, rng), edges[10:])[0], 2*want[10:]).pvalue > 1e-3

@settings(deadline=None)
@given(st.floats(0, 1e6), st.booleans(), st.booleans(), st.integers(1, 9))
def test_any_alpha(alpha, per_batch, fold, bs):
    "λ is a share, the partners are a permutation, and a mixture lies between the two"
    x = torch.rand(bs, 3, 4, 5)
    for mix in Blend(alpha, per_batch, fold), Cut(alpha, per_batch, fold):
        plan = mix.draw(x)
        assert ((plan.lam>=0) & (plan.lam<=1)).all() and len(plan.lam) in ((1,) if per_batch or not alpha else (bs,))
        assert plan.idx.sort().values.equal(torch.arange(bs))
        res,x1 = plan.mix(x), x[plan.idx]
        assert (res >= torch.minimum(x, x1)-1e-6).all() and (res <= torch.maximum(x, x1)+1e-6).all()
        if fold and not isinstance(plan, CutPlan): assert (plan.lam>=.5).all()

def test_partners_are_uniform():
    counts = torch.zeros(5, 5)
    for _ in range(5000): counts[torch.arange(5), draw_partners(5, rng)] += 1
    assert scipy.stats.chisquare(counts.flatten().numpy()).pvalue > 1e-3

@settings(deadline=None)
@given(sizes, st.floats(0, 1))
def test_lam_of_a_cut_is_the_true_share(size, lam):
    n = 16
    plan = CutPlan(draw_boxes(torch.full((n,), lam), size, rng), draw_partners(n, rng), size)
    x = torch.arange(float(n)).view(-1, *[1]*(len(size)+1)).expand(n, 2, *size)
    torch.testing.assert_close(plan.mix(x).flatten(1).mean(1), plan.lam*torch.arange(n) + (1-plan.lam)*plan.idx)
    if lam==1: assert plan.mix(x).equal(x)

@pytest.mark.parametrize('size', [(8,8), (1,12), (12,1), (11,), (5,4,3)], ids=str)
@pytest.mark.parametrize('lam', [.1, .5, .95])
def test_boxes_against_the_paper(size, lam):
    "The mean area is that of a box of sides √(1-λ), centred anywhere and clipped, by Monte Carlo; every pixel is pasted"
    n,side = 40_000, (1-lam)**(1/len(size))
    c = rng.random((n, len(size)))
    want = (np.minimum(c+side/2, 1) - np.maximum(c-side/2, 0)).prod(1)
    mask = box_mask(draw_boxes(torch.full((n,), lam), size, rng), size)
    area = mask.flatten(1).double().mean(1)
    assert abs(area.mean()-want.mean()) < 4*math.hypot(area.std(), want.std())/n**.5
    assert mask.any(0).all()

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8], ids=str)
def test_blend_rounds_once(dtype):
    x,x1 = torch.rand(2, 8, 3, 9)*200
    x,x1,lam = x.to(dtype), x1.to(dtype), torch.rand(8)
    want = lam.double()[:,None,None]*x.double() + (1-lam.double()[:,None,None])*x1.double()
    got = blend(x, x1, lam)
    assert got.dtype==dtype and blend(x, x1, torch.ones(1)).equal(x)
    ulp = .5 if dtype==torch.uint8 else 200*torch.finfo(dtype).eps
    assert (got.double()-want).abs().max() <= ulp*1.01 + 1e-4

def test_a_choice_has_one_stream():
    "Repeatable as one: the parts draw from the stream of the whole"
    whole,x = Choice([Blend(), Cut(), Mix()], p=[.4,.4,.2]), torch.rand(4, 3, 8, 8)
    torch.manual_seed(1)
    whole.reseed()
    a = [whole.draw(x).lam for _ in range(20)]
    torch.manual_seed(1)
    whole.reseed()
    assert all(o.equal(whole.draw(x).lam) for o in a)

def test_values_along_a_signal_or_as_many_labels():
    "A float target of a signal's length could be either, so nothing is guessed"
    plan = Cut(1.).draw(torch.rand(8, 3, 10))
    with pytest.raises(ValueError, match='channel dimension'): plan.weighs(torch.eye(10)[:8])
    assert plan.weighs(torch.rand(8, 9)) and not plan.weighs(torch.rand(8, 1, 10)) and not plan.weighs(torch.randint(0, 4, (8, 10)))

layouts = dict(plain=lambda x: x, channels_last=lambda x: x.to(memory_format=torch.channels_last), transposed=lambda x: x.transpose(2, 3),
    batch_inside=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), strided=lambda x: x[..., ::2], expanded=lambda x: x[:, :1].expand(x.shape))

@pytest.mark.parametrize('layout', layouts)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('size', [(3,3,4,6), (64,3,40,44), (3,3,160,200)], ids=['small','narrow','wide'])
def test_mixing_in_one_pass(size, dtype, layout):
    "Whatever the layout: the values of the definition, in new memory of the same strides as a plain operation's"
    x = layouts[layout](torch.rand(size).to(dtype))
    bs,kept = len(x), x.clone()
    idx,boxes = draw_partners(bs, rng), draw_boxes(draw_lam(bs, 1., rng), x.shape[2:], rng)
    for lam in draw_lam(bs, 1., rng, fold=False), torch.tensor([.7]):
        got,x64 = BlendPlan(lam, idx).mix(x), x.double()
        w = lam.double()[:,None,None,None]
        ulp = torch.finfo(dtype).eps
        want = w*x64 + (1-w)*x64[idx]
        assert ((got.double()-want).abs() <= .51*ulp*want + 2e-7*(dtype!=torch.float64) + 1e-15).all()
        assert got.dtype==dtype and (layout in ('batch_inside', 'expanded') or got.stride()==torch.empty_like(x).stride())
    cut = CutPlan(boxes, idx, x.shape[2:]).mix(x)
    for i,((a,b),(c,d)) in enumerate(boxes):
        want = x[i].clone()
        want[:,a:c,b:d] = x[idx[i]][:,a:c,b:d]
        assert cut[i].equal(want)
    assert x.equal(kept) and len({o.untyped_storage().data_ptr() for o in (x, got, cut)})==3

def test_memory_is_lent_once():
    "As long as a view, an array or autograd holds it, and no longer"
    x,plan = torch.rand(4, 3, 200, 200), BlendPlan(torch.rand(4), torch.tensor([1,2,3,0]))
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

def test_memory_is_not_lent_again_at_exit():
    "Where finalizers run though their objects live on"
    code = """import atexit
@atexit.register
def last(): mix(2.); print(held.min().item(), held.max().item())
import torch; from fastmix.core import BlendPlan
def mix(v): return BlendPlan(torch.full((2,), .5), torch.tensor([1,0])).mix(torch.full((2,3,300,300), v))
held = mix(1.)"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()==['1.0','1.0']

kinds = [(4,6), (1024,3,16,16), (4,3,200,200)]

@pytest.mark.parametrize('size', kinds, ids=['small','narrow','wide'])
def test_a_plan_is_for_one_length(size):
    x,plan = torch.rand(size), BlendPlan(torch.tensor([.7]), draw_partners(size[0], rng))
    for wrong in x[:-1], torch.cat([x, x[:1]]):
        with pytest.raises(ValueError, match=f'{size[0]} samples .* batch of {len(wrong)}'): plan.mix(wrong)
    box = CutPlan(torch.tensor([[[1,1],[3,3]]]), torch.tensor([1,0]), (6,6))
    with pytest.raises(ValueError, match='2 samples .* batch of 3'): box.mix(torch.rand(3, 1, 6, 6))

@pytest.mark.parametrize('cast', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize('size', kinds, ids=['small','narrow','wide'])
def test_autocast_changes_nothing(size, dtype, cast):
    x = torch.rand(size).to(dtype)
    plan = Blend(1.).draw(x)
    with torch.autocast('cpu', dtype=cast): got = plan.mix(x)
    assert got.dtype==dtype and got.equal(plan.mix(x))

@pytest.mark.parametrize('size', kinds, ids=['small','narrow','wide'])
def test_any_float_is_a_lam(size):
    x,idx,lam = torch.rand(size), draw_partners(size[0], rng), torch.rand(size[0], dtype=torch.float64)
    want = unsqueeze_as(lam, x)*x + (1-unsqueeze_as(lam, x))*x[idx]
    torch.testing.assert_close(BlendPlan(lam, idx).mix(x), want.float())
    BlendPlan(lam.requires_grad_(), idx).mix(x).sum().backward()
    torch.testing.assert_close(lam.grad, (x-x[idx]).flatten(1).sum(1).double(), rtol=1e-3, atol=1e-3)

def test_a_box_is_clipped():
    x,idx = torch.arange(2.).view(2,1,1,1).expand(2,1,8,8), torch.tensor([1,0])
    for box in ([-3,-2],[2,3]), ([5,5],[9,20]):
        plan = CutPlan(torch.tensor([box]), idx, (8,8))
        for o in plan.mix(x), plan.mix(x.clone().requires_grad_()): torch.testing.assert_close(o.mean((1,2,3)), torch.cat([1-plan.lam, plan.lam]))
    for o in torch.randn(2, 1, 8, 8, dtype=torch.complex64).conj(), torch.randn(2, 1, 8, 8, dtype=torch.complex64).conj().imag:
        assert plan.mix(o).equal(torch.where(box_mask(plan.boxes, (8,8))[:,None], o[idx], o))

def test_gradients_flow_through_a_mixture():
    x = torch.rand(4, 3, 8, 8, requires_grad=True)
    plan = BlendPlan(torch.tensor([.9,.8,.7,.6]), torch.tensor([1,2,3,0]))
    plan.mix(x).sum().backward()
    torch.testing.assert_close(x.grad[:,0,0,0], torch.tensor([.9+.4, .8+.1, .7+.2, .6+.3]))

def test_plans_drawn_ahead_are_draws_of_their_own():
    "λ and partners of a long run of batches, as SciPy's distribution functions say"
    x,mix = torch.rand(6, 1), Blend(.4, fold=False)
    plans = [mix.draw(x) for _ in range(2000)]
    lam,idx = (torch.stack([getattr(p, o) for p in plans]) for o in ('lam','idx'))
    assert scipy.stats.kstest(lam.flatten().numpy(), scipy.stats.beta(.4, .4).cdf).pvalue > 1e-3
    counts = torch.stack([(idx==j).sum(0) for j in range(6)])
    assert scipy.stats.chisquare(counts.flatten().numpy()).pvalue > 1e-3
    assert abs(np.corrcoef(lam[1:].flatten(), lam[:-1].flatten())[0,1]) < .04 and len(lam.unique()) > .99*lam.numel()

@pytest.mark.parametrize('mix', [Blend(.4), Cut(), Blend(.4, per_batch=True), Mix()], ids=lambda o: type(o).__name__)
def test_a_plan_fits_its_batch(mix):
    "Whatever was drawn ahead for the batches before"
    for shape in [(8,3,6,6)]*5 + [(3,3,6,6), (8,3,9,4), (8,3,9,4)]:
        plan,x = mix.draw(torch.rand(shape)), torch.rand(shape)
        assert plan.idx.sort().values.equal(torch.arange(shape[0])) and plan.mix(x).shape==shape
        if isinstance(plan, CutPlan): assert plan.size==shape[2:] and (plan.boxes<=torch.tensor(shape[2:])).all()

def test_a_changed_hyper_parameter_is_heard_at_once():
    x,mix = torch.rand(64, 1), Blend(1e-5)
    for _ in range(9): assert mix.draw(x).lam.mean() > .9
    mix.alpha = 1e3
    assert mix.draw(x).lam.mean() < .6
    mix.alpha = 0
    assert mix.draw(x).mix(x) is x

class Own(Blend):
    "Hyper-parameters that change in place"
    def __init__(self):
        super().__init__()
        self.alphas,self.w = [1e-5],np.ones(3)
    def plan(self, x, n, idx): return BlendPlan(draw_lam(n, self.alphas[0]*self.w.mean(), self.rng), idx)

def test_a_hyper_parameter_changed_in_place_is_heard_at_once():
    x,mix = torch.rand(64, 1), Own()
    for _ in range(9): assert mix.draw(x).lam.mean() > .9
    mix.alphas[0] = 1e3
    assert mix.draw(x).lam.mean() < .6
    mix.w = np.full(3, 1e-8)
    assert mix.draw(x).lam.mean() > .9

def test_plans_of_inference_stay_there():
    x,mix = torch.rand(8, 1), Blend()
    with torch.inference_mode():
        for _ in range(4): mix.draw(x)
    assert not mix.draw(x).shares.is_inference()

def test_a_choice_takes_any_sequence():
    assert Choice([Blend(), Cut()], np.array([.25,.75])).p==[.25,.75]
    with pytest.raises(ValueError, match='empty'): Choice([])

def test_a_plan_moves_to_a_device_by_name():
    plan = Blend().draw(torch.rand(4, 1))
    assert plan.to('cpu') is plan and plan.to('meta').lam.is_meta

def test_a_mix_is_pickled_without_what_it_drew_ahead():
    "So that a learner exported on a GPU loads without one"
    x,mix = torch.rand(4, 1), Blend()
    for _ in range(2): mix.draw(x)
    assert mix.ahead.plans and not pickle.loads(pickle.dumps(mix)).ahead.plans
    mix.reseed()
    assert not mix.ahead.plans
