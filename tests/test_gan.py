"`GANMixUp` and `gan_mix_loss` on the digits: exact losses, a generator that keeps its own, each way out of a fit"
import pickle, random
from copy import deepcopy
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, CancelTrainException
from fastai.data.core import DataLoaders, TfmdDL
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from fastai.vision.gan import FixedGANSwitcher, GANLearner
from sklearn.datasets import load_digits
from torch import nn
from fastmix.core import draw_lam, private_rng
from fastmix.gan import GANMixUp, gan_mix_loss
from fastmix.mixers import MixUp
from helpers import mk_learn, quiet_fit

pytestmark = pytest.mark.filterwarnings('ignore:You are shadowing')

class Images:
    "Batches of noise and of digits"
    x = torch.tensor(load_digits().data).float()[:320].view(-1, 32, 1, 8, 8)/16
    def __init__(self, n=12): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.randn(32, 5),self.x[i%len(self.x)]

def gen_loss_func(pred, output, target): return F.softplus(-pred).mean()
def crit_loss_func(real_pred, fake_pred): return (F.softplus(-real_pred) + F.softplus(fake_pred)).mean()/2
def mk_gan(*cbs, cls=GANLearner, sigmoid=False, noise=5, **kwargs):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(noise, 64), nn.Sigmoid(), nn.Unflatten(1, (1,8,8)))
    critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), *[nn.Sigmoid()]*sigmoid)
    dls = DataLoaders(*(TfmdDL(Images(n), bs=None, num_workers=0) for n in (12,2)))
    losses = (gen_loss_func,crit_loss_func) if cls is GANLearner else ()
    learn = cls(dls, generator, critic, *losses, switcher=FixedGANSwitcher(n_crit=2, n_gen=1), cbs=list(cbs), **kwargs)
    return learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])

class Record(Callback):
    order = 20
    def before_fit(self): self.recs,self.evals = [],[]
    def before_batch(self): self.recs.append(dict(gen=self.gan_trainer.gen_mode))
    def after_loss(self):
        o,cb = self.recs[-1],getattr(self.learn, 'gan_mix_up', None)
        o.update(x=self.x, y=self.y, pred=self.pred.detach(), loss=self.learn.loss.item(), lam=cb and cb.lam, model=deepcopy(self.model))
        if not self.training: self.evals.append(self.recs.pop())

class Real(Callback):
    "The critic's inputs without mixing"
    order,run_valid = .5,False
    def before_fit(self): self.batches = []
    def before_batch(self): self.batches.append((self.x,self.y))

def bce(logit, lam):
    d = logit.double().sigmoid()
    return -(lam*d.log() + (1-lam)*(1-d).log())

def own_loss(model, output): return F.softplus(-model.critic(output)).mean().item()

def test_the_critic_is_called_with_mixtures_and_predicts_their_weight():
    rec,real = Record(),Real()
    learn = quiet_fit(mk_gan(GANMixUp(1.), rec, real, switch_eval=False), 2)
    crit = [(o,b) for o,b in zip(rec.recs, real.batches) if not o['gen']]
    assert len(rec.recs)==24 and len(crit)==16
    for o,(x,z) in crit:
        fake,lam = o['model'].generator(z).detach(),o['lam']
        for m,a,b,w in zip(o['x'], x, fake, lam): assert torch.allclose(m, w*a + (1-w)*b, atol=1e-6)
        assert o['loss']==pytest.approx(bce(o['model'].critic(o['x'])[:,0], lam).mean().item(), abs=1e-5)
    lams = torch.stack([o['lam'] for o,_ in crit])
    assert lams.min()<.5<lams.max() and len(lams.unique(dim=0))==16
    assert learn.gan_mix_up.lam is None and not {'critic','generator'} & vars(learn.loss_func).keys()

def test_the_generator_and_validation_keep_their_own_loss():
    rec = Record()
    quiet_fit(mk_gan(GANMixUp(.2), rec))
    for o in [o for o in rec.recs if o['gen']]+rec.evals:
        assert o['loss']==pytest.approx(own_loss(o['model'], o['pred']), abs=1e-5) and o['lam'] is None
    assert len(rec.evals)==2

def test_the_papers_minimax():
    rec = Record()
    learn = mk_gan(GANMixUp(.5, minimax=True), rec, switch_eval=False)
    quiet_fit(learn, 2)
    gen = [o for o in rec.recs if o['gen']]
    for o in gen:
        mixed = torch.stack([w*a + (1-w)*b for a,b,w in zip(o['y'], o['pred'], o['lam'])])
        assert o['loss']==pytest.approx(-bce(o['model'].critic(mixed)[:,0], o['lam']).mean().item(), abs=1e-5)
    assert len(gen)==8 and not {'critic','generator'} & vars(learn.loss_func).keys()
    assert learn.loss_func.gen_loss.item()==pytest.approx(rec.evals[-1]['loss'], abs=1e-5)

def test_minimax_moves_the_generator_uphill():
    before,after = [],[]
    class Look(Callback):
        run_valid = False
        def loss(self):
            cb,(real,) = self.learn.gan_mix_up,self.yb
            with torch.no_grad(): return gan_mix_loss(self.model.critic, real, self.model.generator(self.x), cb.lam).item()
        def before_step(self): before.append(self.loss()) if self.gan_trainer.gen_mode else None
        def after_step(self): after.append(self.loss()) if self.gan_trainer.gen_mode else None
    quiet_fit(mk_gan(GANMixUp(.5, minimax=True), Look(), switch_eval=False, opt_func=SGD), 2)
    assert len(before)==8 and all(a>b for a,b in zip(after, before))

def params(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def test_alpha_zero_is_off():
    a,b = mk_gan(),mk_gan(GANMixUp(0))
    for o in a,b:
        torch.manual_seed(3)
        quiet_fit(o, 2)
    assert params(a).equal(params(b))

def test_global_streams_are_not_advanced():
    drawn = []
    for cbs in [],[GANMixUp(.5)]:
        learn = mk_gan(*cbs)
        set_seed(3)
        quiet_fit(learn)
        drawn.append((torch.rand(3).tolist(), np.random.rand(), random.random()))
    assert drawn[0]==drawn[1]

def test_the_same_after_the_same_seed():
    a,b = mk_gan(GANMixUp(.5)),mk_gan(GANMixUp(.5))
    for o in a,b: quiet_fit(set_seed(4) or o)
    assert params(a).equal(params(b))

def test_a_critic_that_ends_in_a_sigmoid():
    rec = Record()
    quiet_fit(mk_gan(GANMixUp(.5, loss_func=F.binary_cross_entropy), rec, sigmoid=True, switch_eval=False))
    for o in [o for o in rec.recs if not o['gen']]: assert o['loss']==pytest.approx(bce(o['pred'].logit()[:,0], o['lam']).mean().item(), abs=1e-4)

    with pytest.raises(ValueError, match='The critic ends in a sigmoid'): quiet_fit(mk_gan(GANMixUp(.5), sigmoid=True))

def test_least_squares_are_fine():
    "Also for a critic that starts far from its targets"
    learn = mk_gan(GANMixUp(.5, loss_func=F.mse_loss))
    learn.loss_func.gen_loss_func = lambda pred, output, target: (pred-1).square().mean()
    with torch.no_grad(): learn.model.critic[1].bias += 5
    quiet_fit(learn)

def test_a_wasserstein_generator_is_refused():
    "Before anything is trained"
    learn = mk_gan(GANMixUp(.2), cls=GANLearner.wgan, clip=None)
    before = params(learn)
    with pytest.raises(ValueError, match=r'as in a Wasserstein GAN.*GANMixUp\(minimax=True\)'): quiet_fit(learn)
    assert params(learn).equal(before)
    quiet_fit(mk_gan(GANMixUp(.2, minimax=True), cls=GANLearner.wgan))

def test_other_learners_are_refused():
    x,y = torch.randn(16, 6),torch.arange(16)%4
    dls = DataLoaders.from_dsets(list(zip(x, y)), list(zip(x, y)), bs=8, num_workers=0, device='cpu')
    with pytest.raises(TypeError, match='critic of a GANLearner is called with, but this is a Learner'): quiet_fit(mk_learn(dls, cbs=GANMixUp()))
    with pytest.raises(ValueError, match='alpha must be'): GANMixUp(-1)
    with pytest.raises(ValueError, match='use GANMixUp'): quiet_fit(mk_gan(MixUp(.2)))

def test_a_generator_of_another_shape():
    learn = mk_gan(GANMixUp(.2))
    learn.model.generator[2] = nn.Unflatten(1, (1,4,16))
    with pytest.raises(ValueError, match=r'shape \(32, 1, 4, 16\) cannot be mixed with a real one of shape \(32, 1, 8, 8\)'): quiet_fit(learn)

class Stop(Callback):
    run_valid = False
    def __init__(self, event, error, order, n): self.event,self.error,self.order,self.n = event,error,order,n
    def __call__(self, event_name):
        if event_name==self.event and self.learn.training:
            self.n -= 1
            if not self.n: raise self.error

@pytest.mark.parametrize('error', [KeyboardInterrupt,CancelBatchException,CancelTrainException,CancelFitException])
@pytest.mark.parametrize('event,minimax', [('before_batch',False),('after_pred',True),('before_step',False),('after_batch',True)])
def test_each_way_out_of_a_fit(event, minimax, error):
    "Afterwards the learner has fastai's own loss again"
    learn = mk_gan(GANMixUp(.5, minimax=minimax), switch_eval=False)
    stop = Stop(event, error, order=20, n=3 if minimax else 2)   # in a batch of the generator, or of the critic
    try: quiet_fit(learn, cbs=stop)
    except (KeyboardInterrupt,CancelBatchException): pass   # the second one where fastai does not catch it, either
    assert stop.n<=0
    z,x = learn.dls.valid.one_batch()
    for o in learn,pickle.loads(pickle.dumps(learn)):
        o.loss_func.switch(True)
        fake = o.model.generator(z)
        assert o.loss_func(fake, x).item()==pytest.approx(own_loss(o.model, fake), abs=1e-5)
        o.loss_func.switch(False)
        real = o.model.critic(x)
        with torch.no_grad(): assert o.loss_func(real, z).item()==pytest.approx(crit_loss_func(real, o.model.critic(fake)).item(), abs=1e-5)
    rec = Record()
    quiet_fit(learn, cbs=rec)
    for o in [o for o in rec.recs if not o['gen']]: assert o['loss']==pytest.approx(bce(o['pred'][:,0], o['lam']).mean().item(), abs=1e-5)
    assert not {'critic','generator'} & vars(learn.loss_func).keys()

class Changed(Callback):
    run_valid = False
    def __init__(self, order): self.order = order
    def before_batch(self): self.learn.yb = tuple(o.clone() for o in self.yb)

def test_targets_that_another_callback_replaces():
    "Allowed before the batch is mixed, and an error afterwards"
    quiet_fit(mk_gan(GANMixUp(.5), Changed(8)))
    with pytest.raises(RuntimeError, match='its loss was not mixed.*at an `order` below 9.5'): quiet_fit(mk_gan(GANMixUp(.5), Changed(20)))

def test_a_plain_loop():
    "Against the formula, with a critic written out by hand"
    torch.manual_seed(0)
    g,d,rng,data = nn.Linear(5, 64),nn.Linear(64, 1),private_rng(),Images()
    opt = torch.optim.SGD(d.parameters(), lr=.1)
    for z,real in map(data.__getitem__, range(len(data))):
        real,lam = real.flatten(1),draw_lam(32, .5, rng, fold=False)
        fake = g(z).detach()
        logit = torch.stack([(w*a + (1-w)*b) @ d.weight[0] + d.bias[0] for a,b,w in zip(real, fake, lam)])
        loss = gan_mix_loss(d, real, fake, lam)
        assert loss.item()==pytest.approx(bce(logit, lam).mean().item(), abs=1e-5)
        opt.zero_grad()
        loss.backward()
        opt.step()

@pytest.mark.parametrize('shape', [(32,),(32,1),(32,1,2,2)])
def test_critics_of_any_output(shape):
    pred,lam = torch.randn(shape),torch.rand(32)
    loss = gan_mix_loss(lambda x: pred, torch.rand(32, 3), torch.rand(32, 3), lam)
    want = torch.stack([bce(p, w).mean() for p,w in zip(pred, lam)]).mean()
    assert loss.item()==pytest.approx(want.item(), abs=1e-5)
