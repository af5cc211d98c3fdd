"One batch's plan: whatever mixes by it agrees with whatever else does"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from fastmix.core import draw_lam, draw_partners, draw_weights
from fastmix.plan import JoinedPlan, Plan, join_plans, unmixed_plan
from fastmix.regions import Boxes, Mask, ShrunkBoxes, draw_boxes, draw_fourier_masks, draw_inner_boxes

rng = np.random.default_rng(0)
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)

def partners(n, k=2): return torch.stack([torch.arange(n), *(draw_partners(n, rng) for _ in range(k-1))], 1)

def plans_of(n, size=(6,7)):
    "A plan of each kind"
    lam,half = draw_lam(n, 1., rng),torch.full((n,), .5)
    return dict(blend=Plan.of(draw_partners(n, rng), lam), three=Plan(partners(n, 3), draw_weights(1, 1., 3, rng)), unmixed=unmixed_plan(n),
        boxes=Plan.of(draw_partners(n, rng), region=Boxes(draw_boxes(half, size, rng), size)),
        shrunk=Plan.of(draw_partners(n, rng), region=ShrunkBoxes(draw_inner_boxes(half, size, rng), size)),
        mask=Plan.of(draw_partners(n, rng), region=Mask(draw_fourier_masks(half[:1], size, rng), size)))

def joined(n, size=(6,7), names=('blend','three','unmixed','boxes','shrunk','mask')):
    plans = {i:o for i,(name,o) in enumerate(plans_of(n, size).items()) if name in names}
    return join_plans(plans, torch.from_numpy(rng.permutation(np.resize(list(plans), n))))

# A plan

@settings(deadline=None)
@given(sizes, st.floats(0, 1))
def test_lam_of_a_cut_is_the_fraction_that_remains(size, lam):
    n = 16
    plan = Plan.of(draw_partners(n, rng), region=Boxes(draw_boxes(torch.full((n,), lam), size, rng), size))
    x = torch.arange(float(n)).view(-1, *[1]*(len(size)+1)).expand(n, 2, *size)
    assert_close(plan.mix(x).flatten(1).mean(1), plan.lam*torch.arange(n) + (1-plan.lam)*plan.idx)
    if lam==1: assert plan.mix(x).equal(x)

@settings(deadline=None)
@given(st.integers(1, 9), st.booleans())
def test_a_mixture_lies_between_its_samples(n, per_batch):
    x = torch.rand(n, 3, 6, 7)
    lam = draw_lam(1 if per_batch else n, 1., rng, fold=False)
    for plan in Plan.of(draw_partners(n, rng), lam), Plan.of(draw_partners(n, rng), region=Boxes(draw_boxes(lam, (6,7), rng), (6,7))):
        a,b = x,x[plan.idx]
        assert (plan.mix(x) >= torch.minimum(a, b)-1e-6).all() and (plan.mix(x) <= torch.maximum(a, b)+1e-6).all()

def test_what_it_holds():
    idx,lam = torch.tensor([2,0,1]),torch.tensor([.5,.75,1.])
    plan = Plan.of(idx, lam)
    assert plan.pairs.tolist()==[[0,2],[1,0],[2,1]] and plan.weights.tolist()==[[.5,.5],[.75,.25],[1,0]]
    assert plan.lam.equal(lam) and plan.idx.equal(idx) and (plan.n,plan.k,plan.region)==(3,2,None)
    assert repr(plan)=='Plan(bs=3, k=2, lam=[0.5  0.75 1.  ])'
    assert unmixed_plan(3).idx.tolist()==[0,1,2] and unmixed_plan(3, 5).n==5
    assert 'region=Boxes(1 of size (6, 6))' in repr(Plan.of(idx, region=Boxes(torch.tensor([[[1,1],[3,3]]]), (6,6))))

def test_a_plan_is_for_one_length():
    for n,plan in [(6,o) for o in (*plans_of(6).values(), joined(6))] + [(8,Plan.of(torch.tensor([6,7,6]), torch.rand(3), n=8))]:
        x = torch.rand(n, 1, 6, 7)
        plan.mix(x)
        for wrong in x[:-1], torch.cat([x, x[:1]]):
            for f in plan.mix,plan.unmixed,plan.gather:
                with pytest.raises(ValueError, match=f'{n} samples .* batch of {len(wrong)}'): f(wrong)

def test_partners_after_the_batch():
    x = torch.rand(8, 2, 5)
    plan = Plan.of(torch.tensor([6,7,5]), torch.tensor([.9]), n=8)
    assert_close(plan.mix(x), .9*x[:3] + .1*x[[6,7,5]])
    assert plan.unmixed(x).equal(x[:3]) and plan.gather(torch.arange(8)).tolist()==[[0,6],[1,7],[2,5]]
    assert unmixed_plan(3, 8).mix(x).equal(x[:3])

def test_what_is_not_mixed_is_not_copied():
    "The mixture is a new tensor, even where λ is 1"
    x = torch.rand(6, 1, 6, 7)
    for name,plan in plans_of(6).items(): assert plan.unmixed(x) is x and (plan.mix(x) is x)==(name=='unmixed')
    same = Plan.of(torch.arange(6), torch.ones(6)).mix(x)
    assert same.equal(x) and same.data_ptr()!=x.data_ptr()

def test_a_mask_is_cut_and_a_class_is_weighted():
    x,mask,y = torch.rand(6, 3, 6, 7),torch.randint(0, 9, (6,6,7)),torch.arange(6)
    for name,plan in plans_of(6).items():
        cuts = plan.region is not None
        assert [plan.is_blended(o) for o in (x, mask, y)]==([False]*3 if name=='unmixed' else [not cuts,not cuts,True])
        if cuts: assert set(map(int, plan.mix(mask).unique())) <= set(map(int, mask.unique())) and plan.mix(mask).dtype==torch.int64
        if not plan.is_blended(mask): continue
        assert plan.gather(mask).equal(torch.stack([mask[js] for js in plan.pairs]))
        with pytest.raises(TypeError, match='cannot be averaged'): plan.mix(mask)

# Others made of it

def test_rows_that_stay():
    x,rows = torch.rand(6, 1, 6, 7),torch.tensor([True,False,False,True,True,False])
    for plan in (*plans_of(6).values(), joined(6), joined(6, names=('blend','three'))):
        left,before = plan.exclude(rows),plan.mix(x).clone()
        assert left.mix(x)[rows].equal(x[rows]) and (left.lam.expand(6)[rows]==1).all() and (left.idx[rows]==torch.arange(6)[rows]).all()
        assert_close(left.mix(x)[~rows], before[~rows])
        assert left.weights.expand(6, -1)[~rows].equal(plan.weights.expand(6, -1)[~rows]) and left.pairs[:,0].equal(torch.arange(6))
        assert plan.mix(x).equal(before)   # a plan never changes

def test_some_samples_in_any_order():
    x,y,rows = torch.rand(6, 1, 6, 7),torch.rand(6),torch.tensor([4,0,4,5])
    for plan in (*plans_of(6).values(), joined(6), joined(6).take(torch.arange(6))):
        some = plan.take(rows)
        assert len(some.pairs)==4 and some.n==6 and some.pairs[:,0].equal(rows) and some.unmixed(x).equal(x[rows])
        assert_close(some.mix(x), plan.mix(x)[rows])
        assert_close(some.mix(y), plan.mix(y)[rows])
        assert_close(some.take(torch.tensor([3,1])).mix(x), plan.mix(x)[[5,0]])
    assert plan.take(torch.tensor([2])).mix(x).shape==(1,1,6,7)

def test_a_plan_moves_to_a_device_by_name():
    for plan in (*plans_of(6).values(), joined(6)):
        moved = plan.to('meta')
        assert moved.pairs.is_meta and moved.weights.is_meta and (moved.n,moved.k,moved.in_order)==(6,plan.k,True) and type(moved) is type(plan)
        assert plan.region is None or moved.region.mask.is_meta
        assert moved.mix(torch.rand(6, 1, 6, 7, device='meta')).shape==(6,1,6,7)
        assert isinstance(plan, JoinedPlan) or plan.to('cpu') is plan

def test_partners_without_targets():
    "Each sample's target with itself; the weights stay. A mask that would be cut is refused"
    y,mask = torch.arange(3),torch.randint(0, 9, (3,6,7))
    for name,plan in [(name,o.take(torch.tensor([2,0,1]))) for name,o in plans_of(3).items()] + [('joined',joined(3))]:
        own = plan.without_partner_targets((y,))
        assert own.weights.equal(plan.weights) and own.gather(y).equal(y[plan.pairs[:,:1]].expand(-1, plan.k)) and own.region is None
        if plan.region is None: assert plan.without_partner_targets((y,mask)).gather(mask).shape==(3,plan.k,6,7)
        else:
            with pytest.raises(ValueError, match='mask cannot be cut'): plan.without_partner_targets((y,mask))

# Several in one

def test_each_sample_is_mixed_by_its_own_part():
    for dtype in torch.float32,torch.bfloat16,torch.uint8:
        x = (torch.rand(12, 3, 6, 7)*200).to(dtype)
        for o in x, x.contiguous(memory_format=torch.channels_last), x.float().requires_grad_():
            plan,kept = joined(12),o.detach().clone()
            got = plan.mix(o)
            assert type(plan) is JoinedPlan and got.dtype==o.dtype and got.stride()==o.stride() and o.equal(kept) and plan.in_order
            assert torch.cat([rows for rows,_ in plan.parts]).sort().values.equal(torch.arange(12)) and len(plan.parts)==6
            for rows,part in plan.parts: assert_close(got[rows], part.mix(o))

def test_what_it_says_is_what_it_does():
    "Where every pixel holds the label, pixels, weights and targets agree"
    y = torch.arange(12.)
    for _ in range(10):
        plan = joined(12)
        pixels = plan.mix(y[:,None,None,None].expand(12, 1, 6, 7)).mean((1,2,3))
        assert plan.k==3 and plan.weights.shape==(12,3) and (plan.weights.sum(1)-1).abs().max()<1e-6
        assert_close(pixels, (plan.weights*y[plan.pairs]).sum(1))
        assert_close(pixels, plan.mix(y))
        assert plan.gather(y).equal(y[plan.pairs]) and plan.is_blended(y)

def test_masks_of_a_joined_plan():
    "Where a part cuts, each place has one value, repeated for each weight; where a part blends, it has all values"
    plan,mask = joined(12),torch.randint(0, 9, (12,6,7))
    got = plan.gather(mask)
    assert plan.is_blended(mask) and got.shape==(12,3,6,7)
    for rows,part in plan.parts:
        for r,o in zip(rows, part.gather(mask) if part.is_blended(mask) else part.mix(mask)[:,None]):
            for i in range(3): assert got[r,i].equal(o[min(i, len(o)-1)] if i<len(o) else o[0])

def test_region_of_a_joined_plan():
    "That of each part in its rows, and nowhere else"
    plan = joined(12)
    for rows,part in plan.parts:
        want = part.region.mask.expand(len(rows), 6, 7) if part.region else torch.zeros(len(rows), 6, 7).bool()
        assert plan.region.mask[rows].equal(want)

def test_the_simplest_that_will_do():
    plans = plans_of(6)
    assert join_plans({3: plans['mask']}, torch.full((6,), 3)) is plans['mask']
    x,which = torch.rand(6, 2),torch.tensor([0,1,2,0,1,2])
    res = join_plans(dict(enumerate([plans['blend'], plans['three'], plans['unmixed']])), which)
    assert type(res) is Plan and res.k==3 and res.region is None and res.in_order
    want = torch.stack([plans[('blend','three','unmixed')[w]].mix(x)[i] for i,w in enumerate(which)])
    assert_close(res.mix(x), want)

def test_joined_plans_are_joined():
    x,inner = torch.rand(12, 1, 6, 7),joined(12)
    which = torch.arange(12)%2
    plan = join_plans({0: inner, 1: plans_of(12)['three']}, which)
    assert_close(plan.mix(x)[which==0], inner.mix(x)[which==0])
    assert plan.region.mask[which==0].equal(inner.region.mask[which==0]) and not plan.region.mask[which==1].any()
