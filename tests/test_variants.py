"Target weights, Remix, RegMixup and LISA, each against its formula, sample by sample"
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy
from torch import nn
from fastmix.calls import MixCalls
from fastmix.check import check_mix
from fastmix.data import digit_images, image_dls
from fastmix.loop import MixCollate
from fastmix.losses import MixLoss, MultiLoss
from fastmix.manifold import ManifoldMixUp
from fastmix.metrics import CleanLoss, MixMetric
from fastmix.mixers import CutMix, MixUp, OneOf
from fastmix.partners import SecondLoader
from fastmix.plan import Plan
from fastmix.soft import SoftMix
from fastmix.variants import RegMixUp, Remix, lisa
from helpers import Record, class_dls, mk_dls, mk_learn, name_of, quiet_fit

counts = [300,100,30,3]
bs,c = 8,4
torch.manual_seed(0)
x,y = torch.rand(bs, 1, 8, 8),torch.randint(c, (bs,))
plan = Plan.of(torch.randperm(bs), torch.rand(bs))

def ce(pred, y, **kwargs): return F.cross_entropy(pred, y, reduction='none', **kwargs)

def remix_by_hand(plan, y, kappa=3., tau=.5):
    res = []
    for lam,(i,j) in zip(plan.lam.tolist(), plan.pairs.tolist()):
        ni,nj = counts[y[i]],counts[y[j]]
        if ni/nj>=kappa and lam<tau: lam = 0.
        elif ni/nj<=1/kappa and 1-lam<tau: lam = 1.
        res.append([lam,1-lam])
    return torch.tensor(res)

class Weights:
    "Target weights that have nothing to do with the images; keeps what it returns"
    def __init__(self): self.seen = []
    def __call__(self, plan, xb, yb):
        w = torch.rand(plan.pairs.shape, generator=torch.Generator().manual_seed(len(self.seen)))
        self.seen.append(w/w.sum(1, keepdim=True))
        return self.seen[-1]
    __name__ = 'Weights'

def by_hand(b, weights, u=ce, y=None):
    "The mean over samples of the losses on each target, by `weights`"
    y = b['yb'][0] if y is None else y
    return sum(w*u(b['pred'], y[at]) for w,at in zip(weights.T, b['plan'].pairs.T)).mean()

# Remix
@pytest.mark.parametrize(('kappa','tau'), [(3.,.5), (1.,1.), (10.,.2)])
def test_remix(kappa, tau):
    plan = Plan.of(torch.randint(40, (40,)), torch.rand(40))
    y = torch.randint(c, (40,))
    got = Remix(counts, kappa, tau)(plan, (), (y,))
    torch.testing.assert_close(got, remix_by_hand(plan, y, kappa, tau))
    assert ((got==0)|(got==1)).any() and (tau==1 or ((got>0)&(got<1)).any())

def test_remix_in_a_fit():
    dls = class_dls(n=64)
    learn = quiet_fit(mk_learn(dls, None, nn.CrossEntropyLoss(), cbs=[MixUp(1., fold=False, target_weights=Remix(counts)), Record()]))
    for b in learn.record.batches: torch.testing.assert_close(b['loss'], by_hand(b, remix_by_hand(b['plan'], b['yb'][0])))

def test_remix_counts_the_training_set():
    images,labels = digit_images()
    dls = image_dls(images[:300], labels[:300], num_workers=0)
    vocab = list(dls.vocab)
    want = [sum(dls.vocab[y]==name for _,y in dls.train_ds) for name in vocab]
    assert Remix.from_dls(dls).counts.tolist()==want

@pytest.mark.parametrize(('make','match'), [(lambda: Remix([]), 'counts must hold'), (lambda: Remix([[1,2]]), 'counts must hold'), (lambda: Remix(counts, .5), 'kappa must be a number of at least 1'),
    (lambda: Remix(counts, tau=2), 'tau must be a fraction'), (lambda: Remix(counts)(plan, (), (y+1,)), 'no samples of class 4'), (lambda: Remix([1,0,1,1])(plan, (), (y*0+1,)), 'no samples of class 1'),
    (lambda: Remix(counts)(plan, (), (y.float(),)), 'Remix needs one class for each sample'), (lambda: Remix(counts)(MixUp(1., k=3).draw(x), (), (y,)), 'mixtures of two samples')])
def test_remix_errors(make, match):
    with pytest.raises(ValueError, match=match): make()

# Target weights of any kind
kinds = dict(blended=MixUp, three=partial(MixUp, k=3), some=partial(MixUp, p=.5), cut=CutMix, joined=partial(OneOf, MixUp(1.), CutMix(), per_batch=False),
    hidden=partial(ManifoldMixUp, layers='0'))

@pytest.mark.parametrize('mixer', kinds.values(), ids=kinds)
def test_target_weights_change_the_loss_only(mixer):
    f = Weights()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    dls = mk_dls([torch.rand(64, 1, 8, 8)], [torch.randint(c, (64,))])
    learn = quiet_fit(mk_learn(dls, model, nn.CrossEntropyLoss(), cbs=[mixer(target_weights=f), Record()]))
    assert len(f.seen)==8
    for b,w in zip(learn.record.batches, f.seen): torch.testing.assert_close(b['loss'], by_hand(b, w))

@pytest.mark.parametrize(('loss_func','u','y'), [(MSELossFlat(), lambda p,y: (p-y).square().mean(1), torch.randn(64, c)),
    (BCEWithLogitsLossFlat(), lambda p,y: F.binary_cross_entropy_with_logits(p, y, reduction='none').mean(1), (torch.rand(64, c)>.5).float())], ids=['numbers','labels'])
def test_blended_targets(loss_func, u, y):
    f = Weights()
    learn = quiet_fit(mk_learn(mk_dls([torch.randn(64, 6)], [y]), None, loss_func, cbs=[MixUp(1., target_weights=f), Record()]))
    for b,w in zip(learn.record.batches, f.seen):
        t = sum(o[:,None]*b['yb'][0][at] for o,at in zip(w.T, b['plan'].pairs.T))
        torch.testing.assert_close(b['loss'], u(b['pred'], t).mean())

def test_metrics_weigh_as_the_loss_does():
    f = Weights()
    learn = mk_learn(class_dls(n=64), metrics=MixMetric(accuracy), cbs=[MixUp(1., target_weights=f), Record()])
    learn.recorder.train_metrics = True
    quiet_fit(learn, lr=0.)
    want = [sum(w*(b['pred'].argmax(1)==b['yb'][0][at]) for w,at in zip(ws.T, b['plan'].pairs.T)).mean() for b,ws in zip(learn.record.batches, f.seen)]
    assert dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))['train_mix_accuracy']==pytest.approx(np.mean(want), abs=1e-5)

def test_other_engines():
    f,pred = Weights(),torch.randn(bs, c)
    plan = MixUp(1., target_weights=f).draw(x, y)
    want = by_hand(dict(pred=pred, plan=plan, yb=(y,)), f.seen[0])
    torch.testing.assert_close(MixLoss(nn.CrossEntropyLoss())(pred, y, plan=plan), want)
    torch.testing.assert_close(MixLoss(nn.CrossEntropyLoss(), plan, (y,))(pred, y), want)
    with MixCalls(plan, y) as own: torch.testing.assert_close(F.cross_entropy(pred, own), want)
    (_,t),plan = MixCollate(MixUp(1., target_weights=f))(list(zip(x, y)))
    torch.testing.assert_close(MixLoss(nn.CrossEntropyLoss())(pred, t, plan=plan), by_hand(dict(pred=pred, plan=plan, yb=(y,)), f.seen[1]))
    _,soft = SoftMix(OneOf(MixUp(1.), target_weights=lambda plan, xb, yb: torch.tensor([[0.,1.]])), c)(x, y)
    assert ((soft==0)|(soft==1)).all()

def test_plans_made_of_plans_keep_them():
    w,rows = torch.rand(bs, 1),torch.randperm(bs)[:5]
    leaning = plan.with_target_weights(torch.cat([w,1-w], 1))
    assert leaning.take(rows).target_weights.equal(leaning.target_weights[rows]) and leaning.to('meta').for_targets.weights.device.type=='meta'
    only = torch.arange(bs)<3
    assert leaning.exclude(only).target_weights[:3].equal(torch.tensor([[1.,0.]]*3))
    assert leaning.exclude(only).target_weights[3:].equal(leaning.target_weights[3:])
    assert plan.target_weights is plan.weights and plan.for_targets is plan

def fit_with(mixer, y=y, loss_func=None):
    model = nn.Conv2d(4, c, 1) if y.ndim>1 else nn.Sequential(nn.Flatten(), nn.Linear(64, c))
    learn = mk_learn(mk_dls([torch.rand(len(y), 4, 4, 4)], [y]), model, loss_func or nn.CrossEntropyLoss(), cbs=mixer)
    before = [p.clone() for p in learn.model.parameters()]
    try: quiet_fit(learn)
    finally: assert all(a.equal(b) for a,b in zip(before, learn.model.parameters()))

wrong = dict(sum=(lambda plan, xb, yb: plan.weights*2, 'with the sum 1 in each row'), nan=(lambda plan, xb, yb: plan.weights*torch.nan, 'with the sum 1'),
    negative=(lambda plan, xb, yb: plan.weights.flip(1)*3-1, 'at least 0'), list=(lambda plan, xb, yb: plan.weights.tolist(), 'but it is a list'),
    shape=(lambda plan, xb, yb: plan.weights[:,0], r'of shape \(8, 2\), but it is a Tensor of torch.float32, of shape \(8,\)'),
    integers=(lambda plan, xb, yb: plan.pairs, 'tensor of floats'))

@pytest.mark.parametrize(('f','match'), wrong.values(), ids=wrong)
def test_what_are_no_weights(f, match):
    with pytest.raises(ValueError, match=match): fit_with(MixUp(1., target_weights=f))

def test_masks_of_which_some_are_cut():
    for mixer in OneOf(MixUp(1.), CutMix(), per_batch=False, target_weights=Weights()),RegMixUp(CutMix(), target_weights=Weights()):
        with pytest.raises(ValueError, match='a mask is cut with its image'): fit_with(mixer, torch.randint(c, (bs,4,4)), CrossEntropyLossFlat(axis=1))

def test_a_function_may_write_into_the_weights():
    def f(plan, xb, yb):
        w = plan.sample_weights
        w[:] = torch.tensor([0.,1.])
        return w.double()
    plan = MixUp(1., target_weights=f).draw(x, y)
    assert plan.target_weights.equal(torch.tensor([[0.,1.]]*bs)) and (plan.weights[:,0]>=.5).all()

def test_errors():
    with pytest.raises(TypeError, match=r'target_weights must be a function of \(plan, xb, yb\)'): MixUp(target_weights=.5)
    with pytest.raises(TypeError, match=r'called as target_weights\(plan, xb, yb\)'): MixUp(target_weights=lambda plan: plan.weights)
    with pytest.raises(ValueError, match='needs the targets of all samples'): MixUp(1., target_weights=Weights()).draw(x)
    with pytest.raises(ValueError, match='all parts of OneOf must share'): OneOf(MixUp(1., target_weights=Weights()))
    with pytest.raises(ValueError, match='a mask is cut with its image'): fit_with(CutMix(target_weights=Weights()), torch.randint(c, (bs,4,4)), CrossEntropyLossFlat(axis=1))
    with pytest.raises(ValueError, match='cannot be mixed sample by sample'): fit_with(MixUp(1., target_weights=Weights()), loss_func=lambda p,y: F.cross_entropy(p, y))

@pytest.mark.parametrize('mixer', [MixUp,CutMix,partial(MixUp, k=3)], ids=['MixUp','CutMix','three'])
@pytest.mark.parametrize('kind', ['classes','labels','numbers'])
def test_check_mix_knows_target_weights(mixer, kind): assert check_mix(mixer(1., target_weights=Weights()), kind)<1e-3

def test_check_mix_finds_a_loss_that_ignores_them():
    class Ignores(MixUp):
        def make_plan(self, d): return super().make_plan(d)
        def draw_batch(self, *args, **kwargs):
            plan,_,*batch = super().draw_batch(*args, **kwargs)
            return plan,Plan(plan.pairs, plan.weights),*batch
    with pytest.raises(AssertionError, match='teaches it'): check_mix(Ignores(1., target_weights=Weights()))

# RegMixup
def regmix(u, b, eta, weight=lambda y: torch.ones(len(y))):
    "The loss of the samples and η times that of the mixtures, each with a mean of its own"
    n = len(b['pred'])//2
    y,p = b['yb'][0],b['plan']
    def mean(pairs, weights, pred):
        terms = [(w*weight(y[at]), u(pred, y[at])) for w,at in zip(weights.T, pairs.T)]
        return sum(w*v for w,v in terms).sum()/sum(w for w,_ in terms).sum()
    return mean(p.pairs[n:,:1], torch.ones(n, 1), b['pred'][n:]) + eta*mean(p.pairs[:n], p.sample_weights[:n], b['pred'][:n])

cw = torch.tensor([.1,1.,2.,5.])
@pytest.mark.parametrize(('loss_func','u','weight'), [(nn.CrossEntropyLoss(), ce, lambda y: torch.ones(len(y))), (nn.CrossEntropyLoss(weight=cw), ce, lambda y: cw[y]),
    (CrossEntropyLossFlat(ignore_index=2), ce, lambda y: (y!=2).float()), (lambda p,y: F.cross_entropy(p, y), ce, lambda y: torch.ones(len(y)))],
    ids=['plain','class weights','ignored','no reduction'])
@pytest.mark.parametrize('mixer', [MixUp(1.),CutMix(),OneOf(MixUp(1.), None, per_batch=False)], ids=name_of)
def test_regmixup_in_a_fit(loss_func, u, weight, mixer):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, c))
    learn = mk_learn(mk_dls([torch.rand(64, 1, 8, 8)], [torch.randint(c, (64,))]), model, loss_func, cbs=[RegMixUp(mixer, eta=.3), Record()])
    for b in quiet_fit(learn).record.batches:
        if b['plan'].k==1: assert b['loss']==loss_func(b['pred'], b['yb'][0])   # one mixer for the batch, and it was None
        else: torch.testing.assert_close(b['loss'], regmix(u, b, .3, weight))

def test_regmixup_of_numbers():
    learn = mk_learn(mk_dls([torch.randn(64, 6)], [torch.randn(64, c)]), None, MSELossFlat(), cbs=[RegMixUp(MixUp(1.), eta=2.), Record()])
    for b in quiet_fit(learn).record.batches:
        t = b['plan'].mix(b['yb'][0])
        torch.testing.assert_close(b['loss'], F.mse_loss(b['pred'][bs:], b['yb'][0]) + 2*F.mse_loss(b['pred'][:bs], t[:bs]))

def test_regmixup_of_masks_that_are_cut():
    dls = mk_dls([torch.rand(32, 4, 4, 4)], [torch.randint(c, (32,4,4))])
    learn = mk_learn(dls, nn.Conv2d(4, c, 1), CrossEntropyLossFlat(axis=1), cbs=[RegMixUp(CutMix(), eta=.5), Record()])
    for b in quiet_fit(learn).record.batches:
        t = b['plan'].mix(b['yb'][0])
        torch.testing.assert_close(b['loss'], F.cross_entropy(b['pred'][bs:], b['yb'][0]) + .5*F.cross_entropy(b['pred'][:bs], t[:bs]))

def test_regmixup_of_several_targets():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(6, c),nn.Linear(6, 1)
        def forward(self, x): return self.a(x),self.b(x)
    plan,pred,t = RegMixUp(MixUp(1.)).draw(x, (y,torch.randn(bs, 1))),Two()(torch.randn(2*bs, 6)),torch.randn(bs, 1)
    got = MixLoss(MultiLoss(nn.CrossEntropyLoss(), nn.MSELoss()))(pred, y, t, plan=plan)
    b = dict(pred=pred[0], plan=plan, yb=(y,))
    want = regmix(ce, b, 1.) + F.mse_loss(pred[1][bs:], t) + F.mse_loss(pred[1][:bs], plan.mix(t)[:bs])
    torch.testing.assert_close(got, want)

class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb,self.lin = nn.Embedding(5, 6),nn.Linear(9, c)
    def forward(self, cat, cont): return self.lin(torch.cat([self.emb(cat[:,0]), cont], 1))

def test_regmixup_of_categories():
    cat,cont,y = torch.randint(5, (64,1)),torch.randn(64, 3),torch.randint(c, (64,))
    learn = mk_learn(mk_dls([cat,cont], [y], n_inp=2), Table(), nn.CrossEntropyLoss(), cbs=[RegMixUp(MixUp(1.)), record := Record()])
    m = learn.model
    def forward(b, cat, cont):
        p = b['plan']
        e = torch.stack([w*m.emb.weight[cat[js,0]] for ws,js in zip(p.sample_weights, p.pairs) for w,js in [(ws[:,None],js)]], 0).sum(1)
        k = torch.stack([(ws[:,None]*cont[js]).sum(0) for ws,js in zip(p.sample_weights, p.pairs)])
        return m.lin(torch.cat([e,k], 1))
    quiet_fit(learn, lr=0.)
    for b in record.batches:
        torch.testing.assert_close(b['pred'], forward(b, *b['xb']))
        torch.testing.assert_close(b['loss'], regmix(ce, b, 1.))

def test_regmixup_leaves_all_else_alone():
    learn = mk_learn(class_dls(n=64, drop_last=False), metrics=[accuracy,MixMetric(accuracy)], cbs=[RegMixUp(MixUp(10.), until=.5), Record()])
    own = learn.loss_func
    learn.recorder.train_metrics = True
    quiet_fit(learn, 2)
    assert [len(b['pred']) for b in learn.record.batches]==[2*bs]*8+[bs]*8 and learn.loss_func is own
    preds,targs = learn.get_preds()
    assert learn.validate()[1]==pytest.approx(accuracy(preds, targs).item())

def test_the_clean_loss_counts_each_sample_once():
    learn = mk_learn(class_dls(n=64), metrics=CleanLoss(), cbs=RegMixUp(MixUp(1.), until=.5))
    learn.recorder.train_metrics = True
    quiet_fit(learn, lr=0.)
    x,y = (torch.stack(o) for o in zip(*learn.dls.train_ds))
    assert dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))['train_clean_loss']==pytest.approx(F.cross_entropy(learn.model(x), y).item(), rel=1e-5)

def test_regmixup_with_a_second_loader_and_remix():
    images,labels = torch.rand(64, 1, 8, 8),torch.randint(c, (64,))
    dls = mk_dls([images], [labels])
    mixer = RegMixUp(MixUp(1.), partners=SecondLoader(mk_dls([images], [labels]).train), target_weights=Remix(counts))
    learn = quiet_fit(mk_learn(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, c)), nn.CrossEntropyLoss(), cbs=[mixer, record := Record()]))
    for b in record.batches:
        p,ys = b['plan'],learn.reg_mix_up.record
        assert len(b['pred'])==2*bs and p.target_weights[bs:].equal(torch.tensor([[1.,0.]]*bs))

def test_the_weight_of_mixtures_may_be_0():
    learn = quiet_fit(mk_learn(class_dls(n=64), cbs=[RegMixUp(MixUp(1.), eta=0.), Record()]))
    for b in learn.record.batches: torch.testing.assert_close(b['loss'], F.cross_entropy(b['pred'][bs:], b['yb'][0]))

@pytest.mark.parametrize(('make','error','match'), [(lambda: RegMixUp(.4), TypeError, 'mixer must be one of fastmix'), (lambda: RegMixUp(MixUp), TypeError, 'add parentheses'),
    (lambda: RegMixUp(MixUp(1.), -1), ValueError, 'eta must be a number of at least 0'), (lambda: RegMixUp(ManifoldMixUp()), ValueError, 'mixes behind hidden layers'), (lambda: RegMixUp(RegMixUp(MixUp(1.))), ValueError, 'cannot be nested'),
    (lambda: fit_with(RegMixUp(MixUp(1.)), loss_func=nn.CrossEntropyLoss(reduction='none')), ValueError, 'RegMixUp adds two losses'),
    (lambda: SoftMix(RegMixUp(MixUp(1.)), c)(x, y), ValueError, 'RegMixUp adds two losses'), (lambda: MixCalls(RegMixUp(MixUp(1.)).draw(x), y), ValueError, 'RegMixUp adds two losses'),
    (lambda: MixLoss(nn.CrossEntropyLoss())(torch.randn(bs, c), y, plan=RegMixUp(MixUp(1.)).draw(x)), ValueError, '8 mixtures and 8 samples')])
def test_regmixup_errors(make, error, match):
    with pytest.raises(error, match=match): make()

# LISA
@pytest.mark.parametrize('p', [0.,1.])
def test_lisa(p):
    rng,y,g = np.random.default_rng(0),torch.randint(3, (60,)),torch.randint(2, (60,))
    for group in None,lambda xb, yb: xb[0][:,2]:
        xb,yb = ((x,),(y,g)) if group is None else ((torch.stack([g*0,g*0,g], 1),),(y,))
        idx = lisa(xb, yb, rng, group, p)
        assert (y[idx]==y).all()==(p==1) and (g[idx]==g).all()==(p==0) and ((y[idx]==y) ^ (g[idx]==g)).all()

def test_lisa_in_a_fit():
    "The group is a second target, which the loss leaves out"
    def loss_func(pred, y, group, reduction='mean'): return F.cross_entropy(pred, y, reduction=reduction)
    y,g = torch.randint(c, (64,)),torch.randint(2, (64,))
    learn = quiet_fit(mk_learn(mk_dls([torch.randn(64, 6)], [y,g]), None, loss_func, cbs=[MixUp(1., partners=partial(lisa, p=1.)), Record()]))
    for b in learn.record.batches:
        (y,g),idx = b['yb'],b['plan'].idx
        assert (y[idx]==y).all() and len(b['plan'].lam)==bs
        torch.testing.assert_close(b['loss'], by_hand(b, b['plan'].weights))

def test_lisa_without_partners():
    one = torch.tensor([0,1,2])
    assert lisa((), (one,one), np.random.default_rng(0)).tolist()==[0,1,2]

@pytest.mark.parametrize(('yb','group','match'), [((y,), None, 'needs the group'), ((y.float(),y), None, 'one class'), ((y,), lambda xb, yb: yb[0][:3], 'a value for each of the 8 samples')])
def test_lisa_errors(yb, group, match):
    with pytest.raises(ValueError, match=match): lisa((x,), yb, np.random.default_rng(0), group)
