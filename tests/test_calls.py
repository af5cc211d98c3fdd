"PyTorch's losses, mixed where they are called: each against its formula, sample by sample"
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from fastmix.calls import MixCalls, functional_losses
from fastmix.mixers import CutMix
from fastmix.plan import Plan, unmixed_plan

torch.manual_seed(0)
bs,c = 7,4
plan = Plan.of(torch.randperm(bs), torch.rand(bs))
x,y = torch.randn(bs, c),torch.randint(c, (bs,))
w = torch.tensor([.2,1.,3.,.5])

def called(f, pred, y, plan=plan, **kwargs):
    with MixCalls(plan, y, **kwargs) as own: return f(pred, own)

def by_sample(u, weight=lambda y: 1., plan=plan, pred=x, y=y):
    "The mean over samples of λ·u(p,y) + (1-λ)·u(p,y'), by the mean of their weights"
    rows = enumerate(zip(plan.pairs.tolist(), plan.sample_weights.tolist()))
    terms = [(lam*u(pred[i:i+1], y[j:j+1]), lam*weight(y[j])) for i,(js,lams) in rows for j,lam in zip(js, lams)]
    return sum(o for o,_ in terms)/sum(o for _,o in terms)

def test_the_list_of_losses():
    names = {f.__name__ for f in functional_losses}
    assert {'cross_entropy','nll_loss','mse_loss','l1_loss','binary_cross_entropy_with_logits','huber_loss','kl_div'} <= names and not {'ctc_loss','softmax','dropout'} & names

@pytest.mark.parametrize('f', [F.cross_entropy, nn.CrossEntropyLoss(), lambda p,y: F.nll_loss(p.log_softmax(1), y),
    lambda p,y: F.cross_entropy(target=y, input=p), lambda p,y: F.cross_entropy(p, y.view(-1)),
    lambda p,y: F.cross_entropy(p.view(-1, c), y.int().long())], ids=['function','module','nll','keywords','view','another type'])
def test_classes(f): torch.testing.assert_close(called(f, x, y), by_sample(F.cross_entropy))

def test_options():
    def u(p, y): return F.cross_entropy(p, y, weight=w, reduction='sum')
    torch.testing.assert_close(called(nn.CrossEntropyLoss(weight=w), x, y), by_sample(u, lambda y: w[y].item()))
    ignoring = torch.where(y==2, -100, y)
    def keep(p, y): return F.cross_entropy(p, y, reduction='sum')
    torch.testing.assert_close(called(F.cross_entropy, x, ignoring), by_sample(keep, lambda y: float(y>=0), y=ignoring))
    torch.testing.assert_close(called(lambda p,y: F.cross_entropy(p, y, reduction='sum')/bs, x, y), by_sample(F.cross_entropy))

@pytest.mark.parametrize('f', [F.mse_loss,F.l1_loss,F.huber_loss,F.smooth_l1_loss,F.binary_cross_entropy_with_logits], ids=lambda f: f.__name__)
def test_numbers_and_labels_are_blended(f):
    t = (torch.rand(bs, c)>.5).float()
    torch.testing.assert_close(called(f, x, t), f(x, plan.mix(t)))
    torch.testing.assert_close(called(lambda p,y: f(p[:,0], y.squeeze(1)), x, t[:,:1]), f(x[:,0], plan.mix(t)[:,0]))

def test_the_gradient():
    a,b = (x.clone().requires_grad_() for _ in range(2))
    called(F.cross_entropy, a, y).backward()
    by_sample(F.cross_entropy, pred=b).backward()
    torch.testing.assert_close(a.grad, b.grad)

def test_compiled_once():
    "The outside of the model is mixed for each batch; the model is not compiled anew"
    compiled = []
    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward
    model = nn.Linear(c, c)
    fast = torch.compile(model, backend=backend)
    for i in range(4):
        plan,x,y = Plan.of(torch.randperm(bs), torch.rand(bs)),torch.randn(bs, c),torch.randint(c, (bs,))
        loss = called(lambda p,y: F.cross_entropy(fast(p), y), x, y, plan)
        torch.testing.assert_close(loss, by_sample(F.cross_entropy, plan=plan, pred=model(x), y=y))
    assert len(compiled)==1

def test_a_compiled_model_that_computes_its_loss():
    def whole(x, labels): return F.cross_entropy(x.tanh(), labels)
    fast = torch.compile(whole, backend='eager')
    for i in range(4):
        plan,x,y = Plan.of(torch.randperm(bs), torch.rand(bs)),torch.randn(bs, c),torch.randint(c, (bs,))
        torch.testing.assert_close(called(fast, x, y, plan), by_sample(F.cross_entropy, plan=plan, pred=x.tanh(), y=y))

def test_the_shape_of_targets_may_be_used():
    called(lambda p,y: F.cross_entropy(p+torch.zeros_like(y)[:,None]+y.new_ones(1), y), x.clone().requires_grad_(), y)

def test_a_loss_inside_of_a_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(c, c)
        def forward(self, x, labels):
            logits = self.out(x)
            return dict(loss=F.cross_entropy(logits.view(-1, c), labels.view(-1), reduction='sum')/len(labels), logits=logits)
    model = Model()
    with MixCalls(plan, y) as own: res = model(x, labels=own)
    torch.testing.assert_close(res['loss'], by_sample(F.cross_entropy, pred=res['logits']))

def test_other_calls_are_left_alone():
    def f(p, y):
        assert (p.argmax(1)==y).equal(p.argmax(1)==own)
        return F.cross_entropy(p, y) + F.mse_loss(p, torch.zeros_like(p))
    with MixCalls(plan, y) as own: loss = f(x, own)
    torch.testing.assert_close(loss, by_sample(F.cross_entropy) + x.square().mean())

def test_masks():
    images,masks = torch.rand(bs, 3, 8, 8),torch.randint(c, (bs,8,8))
    pred = torch.randn(bs, c, 8, 8)
    cut = CutMix().draw(images)
    torch.testing.assert_close(called(F.cross_entropy, pred, masks, cut), F.cross_entropy(pred, cut.mix(masks)))
    torch.testing.assert_close(called(F.cross_entropy, pred, masks), by_sample(F.cross_entropy, pred=pred, y=masks))

def test_several_targets():
    t = torch.rand(bs, 1)
    with MixCalls(plan, y, t) as (a,b): loss = F.cross_entropy(x, a) + F.mse_loss(x[:,:1], b)
    torch.testing.assert_close(loss, by_sample(F.cross_entropy) + F.mse_loss(x[:,:1], plan.mix(t)))

@pytest.mark.parametrize('both', [torch.tensor([[1,2],[3,0],[2,1],[0,3],[1,1],[2,0],[3,3]]), torch.stack([y,y], 1)], ids=['columns','alike'])
def test_columns_of_one_tensor_are_different_targets(both):
    a,b = both.clone().unbind(1)
    with MixCalls(plan, a, b) as (u,v): loss = F.cross_entropy(x, u) + 2*F.cross_entropy(-x, v)
    torch.testing.assert_close(loss, by_sample(F.cross_entropy, y=a) + 2*by_sample(F.cross_entropy, pred=-x, y=b))

def test_targets_that_are_alike_in_this_batch_but_not_their_partners():
    a,b = torch.randint(c, (2*bs,)),torch.randint(c, (2*bs,))
    b[:bs] = a[:bs]
    second = Plan.of(torch.arange(bs)+bs, torch.rand(bs), n=2*bs)
    with MixCalls(second, a, b) as (_,v): loss = F.cross_entropy(x, v)
    torch.testing.assert_close(loss, by_sample(F.cross_entropy, plan=second, y=b))

def test_many_classes_are_told_apart():
    large,p = torch.randint(900, 999, (bs,)),torch.randn(bs, 1000, requires_grad=True)
    got = called(lambda p,y: F.cross_entropy(p, y) + F.cross_entropy(p, y+1), p, large)
    torch.testing.assert_close(got, by_sample(lambda p,y: F.cross_entropy(p, y) + F.cross_entropy(p, y+1), pred=p, y=large))

def write_into(p, y):
    p = p*1
    p[F.one_hot(y, c)>0] = 0.
    return F.cross_entropy(p, y)

@pytest.mark.parametrize('f', [write_into, lambda p,y: F.binary_cross_entropy_with_logits(p, torch.ones(bs, c), weight=1.+F.one_hot(y, c))], ids=['written','weight'])
def test_what_is_written_or_weighed_by_targets(f):
    with pytest.raises(RuntimeError, match='trains on targets'): called(f, x.clone().requires_grad_(), y)

def test_partners_from_elsewhere():
    more = torch.cat([y,torch.randint(c, (bs,))])
    second = Plan.of(torch.arange(bs)+bs, torch.rand(bs), n=2*bs)
    torch.testing.assert_close(called(F.cross_entropy, x, more, second), by_sample(F.cross_entropy, plan=second, y=more))

def test_a_batch_that_is_not_mixed_needs_no_loss():
    with MixCalls(unmixed_plan(bs), y) as own: assert own is y and F.cross_entropy(x, own.clamp(max=1)).equal(F.cross_entropy(x, y.clamp(max=1)))

def test_what_is_made_of_masks_that_are_cut():
    plan = CutMix().draw(torch.rand(bs, 1, 4, 4), masks)
    got = called(lambda p,y: F.cross_entropy(p, (y>1).long()), maps, masks, plan, strict=False)
    torch.testing.assert_close(got, F.cross_entropy(maps, (plan.mix(masks)>1).long()))

@pytest.mark.parametrize('f', [lambda p,y: -p.log_softmax(1)[range(bs),y].mean(), lambda p,y: F.cross_entropy(p[y>0], y[y>0])], ids=['own','indexed'])
def test_a_loss_that_is_not_mixed(f):
    with pytest.raises(RuntimeError, match='trains on targets of a mixed batch outside of the loss'): called(f, x.clone().requires_grad_(), y)
    with pytest.raises(RuntimeError, match='This batch is mixed, but its loss was not.*MixLoss'): called(f, x, y)   # nothing is trained

def dice(p, y): return 1-(2*(p.softmax(1)*F.one_hot(y, c)).sum()/(2*len(y)))

@pytest.mark.parametrize('f', [lambda p,y: F.cross_entropy(p, y) + dice(p, y), lambda p,y: F.cross_entropy(p - .3*F.one_hot(y, c), y),
    lambda p,y: (F.cross_entropy(p, y, reduction='none')*w[y]).mean(),
    lambda p,y: F.cross_entropy(p + nn.Embedding(c, c)(y), y)], ids=['dice','margin','weights','input'])
def test_a_part_that_is_trained_unmixed(f):
    with pytest.raises(RuntimeError, match='trains on targets of a mixed batch'): called(f, x.clone().requires_grad_(), y)

def focal(p, y):
    u = F.cross_entropy(p, y, reduction='none')
    return ((1-(-u).exp())**2*u).mean()

def focal_by_weights(p, y):
    u = F.cross_entropy(p, y, reduction='none')
    return ((1-(-u.detach()).exp())**2*u).mean()

def one_hot(write):
    def f(p, y):
        t = torch.zeros(bs, c)
        write(t, y)
        return F.cross_entropy(p, y) + 1-(p.softmax(1)*t).sum(1).mean()
    return f

def by_row(t, y):
    for row,j in zip(t, y): row[j] = 1
def by_column(t, y):
    for j in range(c): t[:,j].copy_(y==j)
def in_a_view(t, y): t.view(-1)[torch.arange(bs)*c+y] = 1
def scattered(t, y): t.scatter_(1, y[:,None], 1)

def squared(p, y): return F.cross_entropy(p, y, reduction='none').square().mean()

@pytest.mark.parametrize('f', [focal, focal_by_weights, squared, *map(one_hot, (by_row,by_column,in_a_view,scattered))],
    ids=['focal','detached','squared','by row','by column','in a view','scattered'])
def test_what_is_made_of_losses_or_written_into_views(f):
    with pytest.raises(RuntimeError, match='trains on targets of a mixed batch'): called(f, x.clone().requires_grad_(), y)

linear = [lambda u: u.mean(), lambda u: (2*u).view(-1, 1).sum()/5, lambda u: (u*torch.arange(bs)).mean(), lambda u: torch.stack([u,u]).mean()]

@pytest.mark.parametrize('f', linear, ids=['mean','sum','weights','twice'])
def test_what_is_linear_in_losses_of_samples(f):
    got = called(lambda p,y: f(F.cross_entropy(p, y, reduction='none')), x.clone().requires_grad_(), y)
    u = [sum(w*F.cross_entropy(x[i:i+1], y[j:j+1]) for w,j in zip(ws, js)) for i,(ws,js) in enumerate(zip(plan.sample_weights, plan.pairs))]
    want = f(torch.stack(u))
    torch.testing.assert_close(got, want)

masks,maps = torch.randint(c, (bs,4,4)),torch.randn(bs, c, 4, 4)
two = torch.stack([y,y.flip(0)], 1)
nan = torch.where(torch.rand(bs)<.3, torch.nan, torch.randn(bs))

@pytest.mark.parametrize(('f','pred','target'), [
    (lambda p,y: F.cross_entropy(p, y[:,0]) + F.cross_entropy(2*p, y[:,1]), x, two),
    (lambda p,y: F.cross_entropy(p, (y+1).clamp(max=c-1)), x, y),
    (lambda p,y: F.cross_entropy(p[...,::2,::2], y[:,::2,::2]) + F.cross_entropy(p, y), maps, masks),
    (lambda p,y: F.cross_entropy(p, F.one_hot(y, c).float().argmax(1)), x, y),
    (lambda p,y: F.cross_entropy(p.transpose(1, 2).reshape(-1, c), y.view(-1)), maps.flatten(2), masks.flatten(1)),
    (lambda p,y: F.cross_entropy(p.transpose(1, 2).reshape(-1, c), y.reshape(-1), reduction='none').mean(), maps.flatten(2), masks.flatten(1))],
    ids=['columns','shifted','half the size','one hot','joined','joined, unreduced'])
def test_what_is_made_of_each_sample_s_target(f, pred, target):
    torch.testing.assert_close(called(f, pred, target), by_sample(f, pred=pred, y=target))

def test_the_mean_over_the_batch():
    t = torch.rand(bs, c).softmax(1)
    got = called(lambda p,y: F.kl_div(p.log_softmax(1), y, reduction='batchmean'), x, t)
    torch.testing.assert_close(got, by_sample(lambda p,y: F.kl_div(p.log_softmax(1), y, reduction='sum'), y=t))

def test_numbers_that_are_scaled_by_the_batch():
    t = torch.randn(bs)
    got = called(lambda p,y: F.mse_loss(p[:,0], (y-y.mean())/y.std()), x, t)
    torch.testing.assert_close(got, F.mse_loss(x[:,0], plan.mix((t-t.mean())/t.std())))

others = [lambda y: y.flip(0), lambda y: y.sort().values, lambda y: y[torch.randperm(bs)], lambda y: y[:3], lambda y: y.cumsum(0).clamp(max=c-1)]

@pytest.mark.parametrize('f', others, ids=['flipped','sorted','shuffled','some','running'])
def test_targets_of_other_samples(f):
    with pytest.raises(ValueError, match='some of the samples, or with another order'): called(lambda p,y: F.cross_entropy(p[:len(f(y))], f(y)), x.clone().requires_grad_(), y)

def test_targets_that_are_written_to():
    def f(p, y):
        t = torch.zeros(bs, c).scatter_(1, y[:,None], 1)
        return F.binary_cross_entropy_with_logits(p, t)
    with pytest.raises(ValueError, match='were written into.*F.one_hot'): called(f, x.clone().requires_grad_(), y)
    more = torch.cat([y,torch.randint(c, (bs,))])
    def shift(p, y):
        y -= 0
        return F.cross_entropy(p, y)
    with pytest.raises(ValueError, match='were written into'): called(shift, x, more, Plan.of(torch.arange(bs)+bs, torch.rand(bs), n=2*bs))

def test_partners_of_which_more_is_made():
    "What leaves the batch's own targets as they are may change those of the partners"
    more = torch.cat([y.clamp(max=1),torch.full((bs,), 3)])
    second = Plan.of(torch.arange(bs)+bs, torch.rand(bs), n=2*bs)
    got = called(lambda p,y: F.cross_entropy(p, y.clamp(max=1)), x, more, second)
    torch.testing.assert_close(got, by_sample(F.cross_entropy, plan=second, y=more.clamp(max=1)))

def test_checkpoints():
    lin = nn.Linear(c, c)
    def f(use_reentrant): return lambda p,y: checkpoint(lambda p,y: F.cross_entropy(lin(p), y), p, y, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match='reentrant checkpoint'): called(f(True), x.clone().requires_grad_(), y)

def test_a_batch_of_one():
    one = Plan.of(torch.zeros(1, dtype=torch.long), torch.rand(1))
    torch.testing.assert_close(called(lambda p,y: F.mse_loss(p.squeeze(), y.squeeze()), x[:1,0], torch.ones(1), one), F.mse_loss(x[0,0], torch.tensor(1.)))

def test_metrics_may_use_the_targets():
    def f(p, y):
        assert 0<=(p.argmax(1)==y).float().mean()<=1 and p.detach()[range(bs),y].shape==(bs,)
        with torch.no_grad(): dice(p, y)
        return F.cross_entropy(p, y)
    torch.testing.assert_close(called(f, x.clone().requires_grad_(), y), by_sample(F.cross_entropy))

def test_a_part_of_the_targets():
    with pytest.raises(ValueError, match=r'cross_entropy is called with some of the samples.*of shape \(3,\)'): called(lambda p,y: F.cross_entropy(p[:3], y[:3]), x, y)

def test_an_error_of_the_step_is_raised_as_it_is():
    with pytest.raises(KeyError): called(lambda p,y: {}['x'], x, y)
    assert F.cross_entropy(x, y).isfinite()
