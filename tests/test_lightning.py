"`Mixing` and `MixMonitor` in a real `Trainer` on the digits: exact losses, each way out of a fit, precisions, two processes, checkpoints"
import logging, pickle, warnings
from collections import namedtuple
from copy import deepcopy
from io import BytesIO
import lightning.pytorch as pl, numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.schedule import SchedLin
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from fastmix.callback import CutMix, MixUp, OneOf
from fastmix.core import BlendPlan, derange
from fastmix.data import SecondLoader
from fastmix.mixes import Blend
from fastmix.lightning import Mixing, MixMonitor, shadowed
from fastmix.manifold import ManifoldMixUp
from fastmix.tensorboard import mix_grids
from helpers import begin_rank, class_dls, mk_learn, quiet_fit, run_ranks, save_rank

for name in 'lightning.pytorch','lightning.fabric': logging.getLogger(name).setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings('ignore')
Pair = namedtuple('Pair', 'x y')

@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def digits(n=96):
    x,y = load_digits(return_X_y=True)
    return torch.tensor(x[:n]).float().view(-1, 1, 8, 8)/16,torch.tensor(y[:n])

def as_dict(x, y): return dict(img=x, label=y)
def with_keys(x, y): return dict(image=x, target=y, name='a')
def as_tuple(x, y): return x,y
def nested(x, y): return dict(views=[x,'left'], meta=dict(cls=y))
shapes = dict(dict=(as_dict,{}), keys=(with_keys,dict(x='image', y='target')), tuple=(as_tuple,{}), namedtuple=(Pair,{}), nested=(nested,dict(x=('views',0), y=('meta','cls'))))

def loader(shape='dict', bs=16, n=96, shuffle=True): return DataLoader([shapes[shape][0](*o) for o in zip(*digits(n))], batch_size=bs, shuffle=shuffle)

class Digits(pl.LightningModule):
    "Records what each step was given, and what came out"
    at = dict(dict=('img','label'), keys=('image','target'), tuple=(0,1), namedtuple=(0,1))
    def __init__(self, shape='dict', loss=None):
        super().__init__()
        torch.manual_seed(0)
        self.model,self.loss_func,self.shape,self.recs,self.seen = self.mk_model(),loss or nn.CrossEntropyLoss(),shape,[],[]
    def mk_model(self): return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    def forward(self, x): return self.model(x)
    def take(self, batch):
        if self.shape=='nested': return batch['views'][0],batch['meta']['cls']
        return [batch[o] for o in self.at[self.shape]]
    def on_train_batch_start(self, batch, batch_idx): self.recs.append(dict(x0=self.take(batch)[0].clone(), pct=self.trainer.global_step))
    def training_step(self, batch, batch_idx):
        x,y = self.take(batch)
        pred = self(x)
        loss = self.loss_func(pred, y)
        self.recs[-1].update(x=x, y=y, pred=pred.detach(), loss=loss.item(), plan=mixing(self).mixer.plan)
        return loss
    def other(self, kind, batch):
        x,y = self.take(batch)
        self.seen.append((kind, self.loss_func))
        return self.loss_func(self(x), y)
    def validation_step(self, batch, batch_idx): self.other('sanity' if self.trainer.sanity_checking else 'valid', batch)
    def test_step(self, batch, batch_idx): self.other('test', batch)
    def predict_step(self, batch, batch_idx): self.other('predict', batch)
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=.1)

def mixing(module): return next(cb for cb in module.trainer.callbacks if isinstance(cb, Mixing))
quiet = dict(accelerator='cpu', devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
def fit(module, mixer, *callbacks, dl=None, valid=None, ckpt_path=None, keys=None, seed=1, **kwargs):
    cb = mixer if isinstance(mixer, Mixing) else Mixing(mixer, **shapes[module.shape][1], **(keys or {}))
    trainer = pl.Trainer(**{**quiet, 'max_epochs':2, **kwargs}, callbacks=[cb,*callbacks])
    if seed is not None: pl.seed_everything(seed, verbose=False)
    trainer.fit(module, loader(module.shape) if dl is None else dl, valid, ckpt_path=ckpt_path)
    return trainer

def sample_losses(o):
    "For each sample the losses on all targets in the mixture, by their shares"
    plan,p = o['plan'],o['pred'].float()
    rows = zip(range(len(p)), plan.shares.expand(plan.pairs.shape).tolist(), plan.pairs.tolist())
    return torch.stack([sum(w*F.cross_entropy(p[i:i+1], o['y'][j:j+1]) for w,j in zip(ws, js)) for i,ws,js in rows])

def check_exact(module, n=12, atol=1e-6):
    assert len(module.recs)==n
    for o in module.recs:
        assert o['loss']==pytest.approx(sample_losses(o).mean().item(), abs=atol)
        want = torch.stack([sum(w*o['x0'][j] for w,j in zip(ws, js)) for ws,js in zip(o['plan'].shares.expand(o['plan'].pairs.shape), o['plan'].pairs)])
        if o['plan'].region is None: assert torch.allclose(o['x'], want.to(o['x'].dtype), atol=1e-2 if o['x'].dtype==torch.bfloat16 else 1e-6)

def is_clean(module): return 'training_step' not in vars(module) and 'loss_func' not in vars(module) and type(module.loss_func) is nn.CrossEntropyLoss

@pytest.mark.parametrize('shape', shapes)
def test_batches_of_any_shape(shape):
    module = Digits(shape)
    fit(module, MixUp(1.))
    check_exact(module)
    assert is_clean(module)

@pytest.mark.parametrize('mixer', [MixUp(1., per_batch=True), MixUp(1., fold=False), MixUp(1., k=3), CutMix(), OneOf(MixUp(1.), CutMix(), None, per_batch=False),
    Blend(1.), MixUp(1., p=.5), MixUp(1., partners=derange), MixUp(1., soft=True), MixUp(0)], ids=str)
def test_every_mixer(mixer):
    module = Digits()
    fit(module, mixer)
    check_exact(module)

class Function(Digits): loss_func = staticmethod(F.cross_entropy)
class Method(Digits):
    def loss_func(self, pred, y): return F.cross_entropy(pred, y)
for cls in Function,Method:
    def __init__(self):
        pl.LightningModule.__init__(self)
        torch.manual_seed(0)
        self.model,self.shape,self.recs,self.seen = self.mk_model(),'dict',[],[]
    cls.__init__ = __init__

@pytest.mark.parametrize('cls', [Function,Method])
def test_functions_and_methods_as_losses(cls):
    "A method has no reduction to leave out, and so gets one λ for the batch"
    module = cls()
    fit(module, MixUp(1.))
    check_exact(module)
    assert 'loss_func' not in vars(module)
    assert {o['plan'].lam.numel() for o in module.recs} == {1 if cls is Method else 16}

def test_a_loss_of_another_name():
    class Other(Digits):
        def __init__(self):
            super().__init__()
            self.model.criterion = self.loss_func
            del self.loss_func
        def forward(self, x): return self.model[:4](x)
        @property
        def loss_func(self): return self.model.criterion
    module = Other()
    fit(module, MixUp(1.), keys=dict(loss='model.criterion'))
    check_exact(module)
    assert 'criterion' not in vars(module.model)

def test_everything_but_training_sees_its_own_loss():
    module,valid = Digits(),loader(shuffle=False)
    own = module.loss_func
    trainer = fit(module, MixUp(1.), valid=valid, num_sanity_val_steps=1)
    trainer.validate(module, valid, verbose=False)
    trainer.test(module, valid, verbose=False)
    trainer.predict(module, valid)
    assert {kind for kind,_ in module.seen}=={'sanity','valid','test','predict'}
    assert all(loss is own for _,loss in module.seen) and is_clean(module)
    check_exact(module)

class Stop(pl.Callback):
    def __init__(self, event, error): self.event,self.error,self.n = event,error,0
    def __getattribute__(self, name):
        if name.startswith('on_') and name==object.__getattribute__(self, 'event'): return self.fail
        return object.__getattribute__(self, name)
    def fail(self, *args, **kwargs):
        self.n += 1
        if self.n==3: raise self.error

events = 'on_train_batch_start','on_before_backward','on_after_backward','on_before_optimizer_step','on_before_zero_grad','on_train_batch_end','on_validation_batch_end'
@pytest.mark.parametrize('error', [ValueError('stop'),KeyboardInterrupt()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize('event', events)
def test_each_way_out_of_a_fit(event, error):
    module,mixer = Digits(),MixUp(1.)
    with pytest.raises((ValueError,SystemExit)): fit(module, mixer, Stop(event, error), valid=loader(shuffle=False))
    assert is_clean(module)
    module.recs = []
    fit(module, mixer, valid=loader(shuffle=False))
    check_exact(module)

@pytest.mark.parametrize('error', [RuntimeError('out of memory'),KeyboardInterrupt()], ids=lambda o: type(o).__name__)
def test_a_step_that_fails(error):
    class Fails(Digits):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx==2: raise error
            return loss
    module = Fails()
    with pytest.raises((RuntimeError,SystemExit)): fit(module, MixUp(1.))
    assert is_clean(module)

@pytest.mark.parametrize('precision', ['bf16-mixed','bf16-true'])
def test_bf16(precision):
    module = Digits()
    fit(module, MixUp(1.), precision=precision)
    assert {o['x'].dtype for o in module.recs} == {torch.bfloat16 if precision=='bf16-true' else torch.float32}
    assert module.recs[0]['pred'].dtype==torch.bfloat16
    check_exact(module, atol=2e-2 if precision=='bf16-true' else 1e-2)

def test_accumulated_gradients():
    "As a loop would train that adds up the exact gradients of three batches"
    module = Digits()
    fit(module, MixUp(1.), accumulate_grad_batches=3)
    check_exact(module)
    model = Digits().model
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for i,o in enumerate(module.recs):
        (sample_losses({**o, 'pred': model(o['x'])}).mean()/3).backward()
        if i%3==2:
            opt.step()
            opt.zero_grad()
    for p,q in zip(model.parameters(), module.model.parameters()): assert torch.allclose(p, q, atol=1e-6)

def test_a_step_that_is_computed_twice_is_computed_on_one_mixture():
    class Twice(Digits):
        def configure_optimizers(self): return torch.optim.LBFGS(self.parameters(), lr=.1, max_iter=3)
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.recs[-1].setdefault('lams', []).append(self.recs[-1]['plan'].lam)
            return loss
    module = Twice()
    fit(module, MixUp(1.))
    assert all(len(o['lams'])>1 and all(map(o['lams'][0].equal, o['lams'])) for o in module.recs)
    assert not module.recs[0]['lams'][0].equal(module.recs[1]['lams'][0])

def test_manual_optimization():
    class Manual(Digits):
        automatic_optimization = False
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            opt.step()
    module = Manual()
    fit(module, MixUp(1.))
    check_exact(module)

def test_signatures_of_training_step():
    class Short(Digits):
        def training_step(self, batch): return super().training_step(batch, 0)
    module = Short()
    fit(module, MixUp(1.))
    check_exact(module)

def test_a_batch_that_is_left_out():
    class Skips(Digits):
        def training_step(self, batch, batch_idx): return super().training_step(batch, batch_idx) if batch_idx%2 else None
    module = Skips()
    fit(module, MixUp(1.))
    assert sum('loss' in o for o in module.recs)==6

def test_beside_a_callback_that_copies_the_module():
    module = Digits()
    fit(module, MixUp(1.), StochasticWeightAveraging(swa_lrs=.05, swa_epoch_start=1), max_epochs=3)
    check_exact(module, 18)

# Checkpoints and seeds
def test_resumed_as_if_not_interrupted(tmp_path):
    "After half an epoch, too, though there Lightning itself begins the epoch's data again"
    whole,dl = Digits(),loader(shuffle=False)
    fit(whole, MixUp(1.), ModelCheckpoint(tmp_path, filename='{step}', save_top_k=-1, every_n_train_steps=4), dl=dl, max_epochs=4, enable_checkpointing=True)
    for step in 8,12:
        rest = Digits()
        fit(rest, MixUp(1.), dl=dl, max_epochs=4, ckpt_path=tmp_path/f'step={step}.ckpt', seed=99)
        assert len(rest.recs)==24-step
        for o,p in zip(whole.recs[step:], rest.recs): assert o['plan'].lam.equal(p['plan'].lam) and o['plan'].idx.equal(p['plan'].idx)
        assert step%6 or all(torch.allclose(p, q, atol=1e-6) for p,q in zip(whole.parameters(), rest.parameters()))

def test_a_second_fit_is_mixed_anew():
    module,cb = Digits(),Mixing(MixUp(1.))
    for _ in range(2): fit(module, cb, seed=None)
    lams = torch.stack([o['plan'].lam for o in module.recs])
    assert len(lams.unique(dim=0))==len(lams)==24

def test_the_same_after_the_same_seed():
    a,b = Digits(),Digits()
    for o in a,b: fit(o, MixUp(1.))
    assert all(o['x'].equal(p['x']) for o,p in zip(a.recs, b.recs))

def test_numbers_of_the_training_are_left_alone():
    "With alpha=0 it trains bit for bit as without, and mixing draws nothing from the global streams"
    class Plain(Digits):
        def training_step(self, batch, batch_idx): return self.loss_func(self(batch['img']), batch['label'])
    plain = Plain()
    pl.seed_everything(1, verbose=False)
    pl.Trainer(**quiet, max_epochs=2).fit(plain, loader())
    for alpha in 0,1.:
        module = Digits()
        fit(module, MixUp(alpha))
        assert all(p.equal(q) for p,q in zip(plain.parameters(), module.parameters()))==(alpha==0)

def test_pickled_and_copied():
    cb = Mixing(MixUp(.3), x='image')
    for o in pickle.loads(pickle.dumps(cb)),deepcopy(cb): assert (o.mixer.mix.alpha,o.keys.x) == (.3,'image')
    fit(Digits(), cb2 := Mixing(MixUp(.3)))
    assert pickle.loads(pickle.dumps(cb2)).seed==cb2.seed

# Other inputs
@pytest.mark.parametrize('whole', [True,False])
def test_integers_are_looked_up_and_mixed(whole):
    "Whether `training_step` calls the module, or a part of it without its `forward`"
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.out = nn.Embedding(17, 4),nn.Linear(4, 10)
        def forward(self, x): return self.out(self.emb(x.flatten(1)).mean(1))
    class Ints(Digits):
        def mk_model(self): return Lookup()
        def __call__(self, *args): return super().__call__(*args) if whole or len(args)>1 else self.model(*args)
    x,y = digits()
    dl = DataLoader([dict(img=(16*a).long(), label=b) for a,b in zip(x, y)], batch_size=16)
    module = Ints()
    fit(module, MixUp(1.), dl=dl, max_epochs=1, max_steps=1)
    o, = module.recs
    e = Ints().model.emb(o['x0'].flatten(1))
    lam = o['plan'].lam[:,None,None]
    want = Ints().model.out((lam*e + (1-lam)*e[o['plan'].idx]).mean(1))
    assert torch.allclose(o['pred'], want, atol=1e-5)
    assert o['loss']==pytest.approx(sample_losses(o).mean().item(), abs=1e-5)

def test_integers_for_a_part_of_a_part():
    "Are not followed, and that is said, before anything is trained on"
    class Inner(Digits):
        def mk_model(self): return nn.Sequential(nn.Sequential(nn.Embedding(17, 4), nn.Flatten(), nn.Linear(256, 10)))
        def __call__(self, x): return self.model[0](x.flatten(1))
    dl,module = DataLoader([dict(img=(16*a).long(), label=b) for a,b in zip(*digits())], batch_size=16),Inner()
    before = deepcopy(module.state_dict())
    with pytest.raises(TypeError, match='the model looks nothing up by it'): fit(module, MixUp(1.), dl=dl)
    assert all(before[k].equal(v) for k,v in module.state_dict().items()) and is_clean(module)

@pytest.mark.parametrize('whole', [True,False])
def test_hidden_layers(whole):
    class Either(Digits):
        def forward(self, x): return self.model(x)
        def __call__(self, *args): return super().__call__(*args) if whole or len(args)>1 else self.model(*args)
    module = Either()
    fit(module, ManifoldMixUp(1., layers='model.2'), max_steps=1, max_epochs=1)
    o,m = module.recs[0],Either().model
    h,lam = m[:3](o['x0']),o['plan'].lam[:,None]
    assert torch.allclose(o['pred'], m[3](lam*h + (1-lam)*h[o['plan'].idx]), atol=1e-5)

def test_partners_from_a_second_loader():
    x,y = digits()
    second = DataLoader(list(zip(x, torch.zeros_like(y))), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(3))
    module = Digits()
    fit(module, MixUp(1., partners=SecondLoader(second)))
    for o in module.recs:
        p,lam = o['pred'],o['plan'].lam
        want = lam*F.cross_entropy(p, o['y'], reduction='none') + (1-lam)*F.cross_entropy(p, 0*o['y'], reduction='none')
        assert o['loss']==pytest.approx(want.mean().item(), abs=1e-5)

def test_schedules_follow_the_training():
    module,mixer = Digits(),MixUp(SchedLin(.2, 1.))
    fit(module, mixer)
    assert mixer.hps['alpha'] == pytest.approx([.2+.8*i/12 for i in range(12)])

def test_schedules_of_several_optimizers():
    "Follow the batches, of which each has two steps"
    class Two(Digits):
        automatic_optimization = False
        def configure_optimizers(self): return [torch.optim.SGD(self.parameters(), lr=.1) for _ in range(2)]
        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            for opt in self.optimizers(): opt.step()
    mixer = MixUp(SchedLin(.2, 1.))
    fit(Two(), mixer)
    assert mixer.hps['alpha'] == pytest.approx([.2+.8*i/12 for i in range(12)])

def test_hidden_layers_of_another_input_after_a_backward_pass():
    "Are not mixed, in manual optimization"
    class Manual(Digits):
        automatic_optimization = False
        def training_step(self, batch, batch_idx):
            self.manual_backward(Digits.training_step(self, batch, batch_idx))
            other = torch.rand(16, 1, 8, 8)
            with torch.no_grad(): got,want = self(other),nn.functional.linear(self.model[1](other.flatten(1)).relu(), self.model[3].weight, self.model[3].bias)
            assert torch.allclose(got, want, atol=1e-6)
    fit(Manual(), ManifoldMixUp(1., layers='model.2'))

@pytest.mark.parametrize('layer', ['model.2',None])
@pytest.mark.parametrize('use_reentrant', [True,False])
def test_checkpointed_layers(layer, use_reentrant):
    "Have the gradients of those that are not"
    class Checkpointed(Digits):
        saves = True
        def forward(self, x):
            x.requires_grad_()
            f = self.model[:3]
            return self.model[3](checkpoint(f, x, use_reentrant=use_reentrant) if self.saves else f(x))
    class Not(Checkpointed): saves = False
    both = Checkpointed(),Not()
    for module in both: fit(module, ManifoldMixUp(1., layers=layer) if layer else MixUp(1.))
    for p,q in zip(*(o.parameters() for o in both)): assert torch.allclose(p, q, atol=1e-6)
    check_exact(both[0]) if not layer else None

def test_targets_in_front():
    "Of a tuple, for numbers too, where nothing would be noticed later"
    class Front(Digits):
        def take(self, batch): return batch[1],batch[0]
        def training_step(self, batch, batch_idx):
            x,y = self.take(batch)
            loss = self.loss_func(self(x)[:,0], y)
            self.recs[-1].update(x=x, y=y, plan=mixing(self).mixer.plan)
            return loss
    x,y = digits()
    module = Front(loss=nn.MSELoss())
    fit(module, MixUp(1.), dl=DataLoader(list(zip(y.float(), x)), batch_size=16), keys=dict(y=0))
    for o,i in zip(module.recs, range(0, 96, 16)):
        lam,idx = o['plan'].lam,o['plan'].idx
        assert torch.allclose(o['y'], lam*y[i:i+16] + (1-lam)*y[i:i+16][idx], atol=1e-5)
        assert torch.allclose(o['x'], lam[:,None,None,None]*o['x0'] + (1-lam[:,None,None,None])*o['x0'][idx], atol=1e-6)

@pytest.mark.filterwarnings('error:training_step calls')
@pytest.mark.parametrize('f', [lambda y: y, lambda y: y[:,None], lambda y: y.double()], ids=['same','view','double'])
def test_numbers_as_targets(f):
    class Numbers(Digits):
        def training_step(self, batch, batch_idx): return self.loss_func(f(self(batch['img'])[:,0]), f(batch['label'].squeeze()))
    x,y = digits()
    fit(Numbers(loss=nn.MSELoss()), MixUp(1.), dl=DataLoader([dict(img=a, label=b) for a,b in zip(x, y.float())], batch_size=16))

def test_other_numbers_than_those_that_were_mixed():
    class Other(Digits):
        def training_step(self, batch, batch_idx): return self.loss_func(self(batch['img'])[:,0], batch['target'])
    x,y = digits()
    dl = DataLoader([dict(img=a, label=b, target=b+1) for a,b in zip(x, y.float())], batch_size=16)
    with pytest.warns(UserWarning, match='with other targets than those that MixUp has mixed'): fit(Other(loss=nn.MSELoss()), MixUp(1.), dl=dl)

def masks(n=32):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, 4, 4, generator=g),torch.randint(0, 10, (n,4,4), generator=g),torch.rand(n, 4, 4, generator=g)

class Dense(Digits):
    "A prediction for each pixel"
    def mk_model(self): return nn.Conv2d(1, 10, 1)
    def training_step(self, batch, batch_idx): return self.step(*batch)
    def on_train_batch_start(self, batch, batch_idx): pass

def test_masks_that_are_taken_for_an_input():
    "As bytes they could be pictures; behind them in the batch are weights"
    class Weighed(Dense):
        def step(self, x, y, w): return self.loss_func(self(x), y.long())
    x,y,w = masks()
    with pytest.raises(ValueError, match='with integers that MixUp has taken for an input'): fit(Weighed('tuple'), MixUp(1.), dl=DataLoader(list(zip(x, y.byte(), w)), batch_size=16))

@pytest.mark.parametrize('part', [lambda p,y: (F.avg_pool2d(p, 2), y[:,::2,::2]), lambda p,y: (p[:4], y[:4])], ids=['smaller','fewer'])
def test_a_second_call_of_the_loss_that_is_not_mixed_is_an_error(part):
    class Deep(Dense):
        def step(self, x, y):
            p = self(x)
            return self.loss_func(p, y) + .5*self.loss_func(*part(p, y))
    x,y,_ = masks()
    with pytest.raises(RuntimeError, match='calls self.loss_func more than once'): fit(Deep('tuple'), MixUp(1.), dl=DataLoader(list(zip(x, y)), batch_size=16))

@pytest.mark.parametrize('other', [lambda p,y: torch.zeros_like(y), lambda p,y: y.clone()], ids=['zeros','copy'])
def test_a_call_of_the_loss_with_other_targets_is_a_warning(other):
    "Such as domains, or what a teacher says: they may happen to equal the targets"
    class Two(Dense):
        def step(self, x, y):
            p = self(x)
            return self.loss_func(p, y) + .1*self.loss_func(p, other(p, y))
    x,y,_ = masks()
    with pytest.warns(UserWarning, match='with other targets'): fit(Two('tuple'), MixUp(1.), dl=DataLoader(list(zip(x, y*0)), batch_size=16))

def test_deep_supervision_by_one_loss():
    "The way out that the error tells of"
    def deep(preds, y, reduction='mean'):
        u = [F.cross_entropy(p, t, reduction='none').flatten(1).mean(1) for p,t in zip(preds, (y,y[:,::2,::2]))]
        return u[0]+.5*u[1] if reduction=='none' else (u[0]+.5*u[1]).mean()
    class Deep(Dense):
        def step(self, x, y):
            p = self(x)
            loss,plan = self.loss_func((p,F.avg_pool2d(p, 2)), y),mixing(self).mixer.plan
            want = [deep((p,F.avg_pool2d(p, 2)), y[i], 'none') for i in plan.pairs.T]
            self.recs.append((loss.item(), (plan.lam*want[0] + (1-plan.lam)*want[1]).mean().item()))
            return loss
    x,y,_ = masks()
    module = Deep('tuple', loss=deep)
    fit(module, MixUp(1.), dl=DataLoader(list(zip(x, y)), batch_size=16))
    assert len(module.recs)==4 and all(a==pytest.approx(b, abs=1e-6) for a,b in module.recs)

@pytest.mark.parametrize('hook', ['on_before_batch_transfer','on_after_batch_transfer'])
@pytest.mark.parametrize('shape,precision', [('tuple','32-true'), ('dict','32-true'), ('tuple','64-true')])
def test_partners_pass_the_hooks_that_batches_pass(shape, precision, hook):
    class Shifts(Digits): pass
    def shift(self, batch, dataloader_idx):
        x,y = self.take(batch)
        return shapes[self.shape][0](x+10, y)
    setattr(Shifts, hook, shift)
    module = Shifts(shape)
    fit(module, MixUp(1., partners=SecondLoader(loader(shape))), precision=precision)
    assert all(o['x'].min()>=10-1e-4 and not o['x'].equal(o['x0']) for o in module.recs)

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64], ids=str)
def test_classes_that_are_taken_for_an_input(dtype):
    "Behind them in the batch are weights, which are taken for the target"
    class Weighed(Digits):
        def training_step(self, batch, batch_idx):
            x,y,w = batch
            return self.loss_func(self(x), y.long())
    x,y = digits()
    with pytest.raises(TypeError, match='can not be averaged'):
        fit(Weighed('tuple'), MixUp(1.), dl=DataLoader([(a,b.to(dtype),torch.rand(())) for a,b in zip(x, y)], batch_size=16))

@pytest.mark.parametrize('kwargs', [True,False])
def test_losses_called_by_keyword(kwargs):
    class Keyword(Digits):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            pred = self(batch['img'])
            loss = self.loss_func(input=pred, target=batch['label']) if kwargs else self.loss_func(pred, target=batch['label'])
            assert loss.item()==pytest.approx(self.recs[-1]['loss'])
            return loss
    module = Keyword()
    fit(module, MixUp(1.))
    check_exact(module)

@pytest.mark.parametrize('as_module', [True,False])
def test_a_loss_that_is_changed_in_a_step_stays_changed(as_module):
    new = nn.CrossEntropyLoss(label_smoothing=.1) if as_module else F.nll_loss
    class Changes(Digits):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx==5: self.loss_func = new
            return loss
    module = Changes() if as_module else Changes.__new__(Changes)
    if not as_module:
        Function.__init__(module)
        vars(module)['loss_func'] = F.cross_entropy
    fit(module, MixUp(1.), max_epochs=1)
    assert module.loss_func is new

def test_after_the_learning_rate_was_searched():
    module,cb = Digits(),Mixing(MixUp(1.))
    module.lr = .1
    trainer = pl.Trainer(**{**quiet, 'max_epochs':2}, callbacks=[cb])
    pl.tuner.Tuner(trainer).lr_find(module, loader(), num_training=5, attr_name='lr')
    module.recs = []
    trainer.fit(module, loader())
    check_exact(module)

def test_a_checkpoint_that_is_only_validated():
    "Does not repeat the numbers of its fit in the next one"
    module,cb = Digits(),Mixing(MixUp(1.))
    trainer = fit(module, cb)
    trainer.save_checkpoint('x.ckpt')
    trainer.validate(module, loader(shuffle=False), ckpt_path='x.ckpt', verbose=False, weights_only=False)
    fit(module, cb, seed=None)
    assert len(torch.stack([o['plan'].lam for o in module.recs]).unique(dim=0))==24

def test_a_mixer_that_fastai_has_stays_there():
    mixer = MixUp(1.)
    learn = mk_learn(class_dls(), cbs=mixer)
    module = Digits()
    pl.Trainer(**quiet, callbacks=[Mixing(mixer)]).validate(module, loader(shuffle=False), verbose=False)
    quiet_fit(learn)
    assert mixer.learn is learn

# Errors
def test_losses_that_can_not_be_shadowed():
    class Held(Digits):
        def __init__(self):
            super().__init__()
            self.losses = nn.ModuleDict(dict(cls=self.loss_func))
            self.more = nn.ModuleList([self.loss_func])
        @property
        def criterion(self): return self.loss_func
    for name in 'losses.cls','more.0','criterion','losses.x.y':
        with pytest.raises(ValueError, match=f"Held has no loss '{name}' to mix.*takes from a list or dict"): fit(Held(), MixUp(1.), keys=dict(loss=name))

def test_two_mixers():
    class Mine(Mixing): pass
    with pytest.raises(ValueError, match='more than one Mixing'): fit(Digits(), MixUp(1.), Mine(CutMix()))

def test_what_is_wrong_is_said_before_training():
    module = Digits()
    wrong = {'loss':"Digits has no loss 'criterion'.*Losses among its attributes: loss_func", 'x':"'criterion' is not in a dict with the keys 'img', 'label'"}
    for name,match in wrong.items():
        before = deepcopy(module.state_dict())
        with pytest.raises(ValueError, match=match): fit(module, MixUp(1.), keys={name:'criterion'})
        assert is_clean(module) and all(before[k].equal(v) for k,v in module.state_dict().items())
    with pytest.raises(TypeError, match='mixer must be a mixer'): Mixing(.4)
    with pytest.raises(ValueError, match='length of the training must be known'): fit(module, MixUp(SchedLin(.1, 1.)), max_epochs=-1)

class Straight(Digits):
    def training_step(self, batch, batch_idx): return F.cross_entropy(self(batch['img']), batch['label'])
class Copies(Digits):
    def training_step(self, batch, batch_idx): return self.loss_func(self(batch['img']), batch['label'].clone())

@pytest.mark.parametrize('cls', [Straight,Copies])
def test_a_loss_that_was_not_mixed_is_an_error(cls):
    module = cls()
    before = deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match='training_step has not called self.loss_func with the targets as they are'): fit(module, MixUp(1.))
    assert all(before[k].equal(v) for k,v in module.state_dict().items()) and is_clean(module)

def test_shadowed_attributes_come_back():
    o = Digits()
    own = o.loss_func
    with pytest.raises(KeyError), shadowed(o, 'loss_func', 1):
        assert o.loss_func==1
        raise KeyError
    assert o.loss_func is own
    with shadowed(o, 'shape', 'x'): assert o.shape=='x'
    assert o.shape=='dict'

def test_hidden_layers_of_a_batch_that_is_left_out():
    class Skips(Digits):
        def training_step(self, batch, batch_idx): return super().training_step(batch, batch_idx) if batch_idx%2 else None
    module = Skips()
    fit(module, ManifoldMixUp(1., layers='model.2'))
    assert sum('loss' in o for o in module.recs)==6

# Pictures
def read(folder):
    file, = folder.rglob('events*')
    return EventAccumulator(str(file), dict.fromkeys(['images','histograms','scalars','tensors'], 0)).Reload()

def picture(event): return np.asarray(Image.open(BytesIO(event.encoded_image_string))).astype(float)/255

def test_pictures_in_tensorboard(tmp_path):
    module = Digits()
    fit(module, MixUp(SchedLin(.2, 1.)), MixMonitor(vocab=list('abcdefghij')), logger=TensorBoardLogger(tmp_path))
    log = read(tmp_path)
    for epoch in 0,1:
        o = module.recs[6*epoch]
        for name,grid in mix_grids(o['x0'][:9], o['x'][:9]).items():
            event = log.Images(f'mix/{name}')[epoch]
            assert event.step==6*epoch+1 and abs(picture(event)-grid.permute(1,2,0).numpy()).max()<1/255
        text = log.Tensors('mix/targets/text_summary')[epoch].tensor_proto.string_val[0].decode()
        i = o['plan'].lam[:9].argmin()
        lam,a,b = o['plan'].lam[i],o['y'][i],o['y'][o['plan'].idx[i]]
        assert f'| {i+1} | {lam:.2f} {"abcdefghij"[a]} + {1-lam:.2f} {"abcdefghij"[b]} |' in text
        h = log.Histograms('mix/lam')[epoch].histogram_value
        assert h.sum==pytest.approx(sum(p['plan'].lam.sum().item() for p in module.recs[6*epoch:6*epoch+6]), abs=1e-3)
    assert [o.step for o in log.Scalars('mix/alpha')]==list(range(1, 13))

def test_every_n_batches(tmp_path):
    fit(Digits(), MixUp(1.), MixMonitor(every=5), logger=[CSVLogger(tmp_path/'csv'),TensorBoardLogger(tmp_path/'tb')])
    assert [o.step for o in read(tmp_path/'tb').Images('mix/mixed')]==[5,10]

def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_SILENT', 'true')
    logger,module = WandbLogger(save_dir=tmp_path, offline=True),Digits()
    fit(module, MixUp(1.), MixMonitor(), logger=logger, log_every_n_steps=1)
    logger.experiment.finish()
    files = list(tmp_path.glob('wandb/offline-run*/files/media/images/mix/mixed*.png'))
    grid = mix_grids(*(module.recs[0][o][:9] for o in ('x0','x')))['mixed'].permute(1,2,0).numpy()
    assert len(files)==2 and min(abs(np.asarray(Image.open(f).convert('RGB'))/255-grid).max() for f in files)<=1/255

def test_pictures_of_a_resumed_epoch(tmp_path):
    dl = loader(shuffle=False)
    fit(Digits(), MixUp(1.), ModelCheckpoint(tmp_path, filename='{step}', save_top_k=-1, every_n_train_steps=4), dl=dl, enable_checkpointing=True)
    fit(Digits(), MixUp(1.), MixMonitor(every=1), dl=dl, ckpt_path=tmp_path/'step=8.ckpt', logger=TensorBoardLogger(tmp_path))
    assert [o.step for o in read(tmp_path).Images('mix/mixed')]==[9,10,11,12]

@pytest.mark.parametrize('vocab', [np.array(list('ab')),['a'],None], ids=str)
def test_labels_without_a_name(tmp_path, vocab):
    x,y = digits()
    dl = DataLoader([dict(img=a, label=torch.tensor(-100) if b==1 else b) for a,b in zip(x, y)], batch_size=16)
    fit(Digits(), MixUp(1.), MixMonitor(vocab=vocab), dl=dl, logger=TensorBoardLogger(tmp_path))
    assert '-100' in ''.join(o.tensor_proto.string_val[0].decode() for o in read(tmp_path).Tensors('mix/targets/text_summary'))

def test_lam_of_an_interrupted_fit_is_not_of_the_next(tmp_path):
    monitor = MixMonitor()
    for i,stop in enumerate([[Stop('on_after_backward', ValueError('stop'))],[]]):
        try: fit(Digits(), MixUp(1.), monitor, *stop, logger=TensorBoardLogger(tmp_path/str(i)))
        except ValueError: pass
    assert [o.histogram_value.num for o in read(tmp_path/'1').Histograms('mix/lam')]==[96,96]

def test_loggers_that_take_no_pictures(tmp_path):
    module = Digits()
    for logger,match in [(CSVLogger(tmp_path),'it has CSVLogger'),(False,'it has none')]:
        with pytest.raises(ValueError, match=match): fit(module, MixUp(1.), MixMonitor(), logger=logger)
    with pytest.raises(ValueError, match='no mixer to report of'): pl.Trainer(**{**quiet, 'logger':TensorBoardLogger(tmp_path)}, callbacks=MixMonitor()).fit(module, loader())
    assert not module.recs

# Two processes
@pytest.fixture(scope='module')
def ranks(tmp_path_factory): return run_ranks(__file__, tmp_path_factory.mktemp('lightning'))

def test_two_processes(ranks):
    "Each rank's losses are exact, ranks mix differently, and the parameters move as by the mean over both"
    a,b = ranks
    for o in a['recs']+b['recs']: o['plan'] = BlendPlan(o['lam'], o['idx'])
    model = Digits().model
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for steps in zip(a['recs'], b['recs'], strict=True):
        for o in steps: assert o['loss']==pytest.approx(sample_losses(o).mean().item(), abs=1e-5)
        assert not steps[0]['plan'].lam.equal(steps[1]['plan'].lam) and not steps[0]['x0'].equal(steps[1]['x0'])
        (sum(sample_losses({**o, 'pred': model(o['x'])}).mean() for o in steps)/2).backward()
        opt.step()
        opt.zero_grad()
    assert len(a['recs'])==6 and a['seed']==b['seed'] and a['clean'] and b['clean']
    for p,q,r in zip(model.parameters(), a['params'], b['params']): assert q.equal(r) and torch.allclose(p, q, atol=1e-5)

if __name__=='__main__':
    out,rank = begin_rank()
    warnings.filterwarnings('ignore')
    module = Digits()
    trainer = fit(module, MixUp(1.), MixMonitor(), devices=2, strategy='ddp', logger=TensorBoardLogger(out))
    recs = [{k:v for k,v in o.items() if k!='plan'} | dict(lam=o['plan'].lam, idx=o['plan'].idx) for o in module.recs]
    save_rank(dict(recs=recs, seed=mixing(module).seed, clean=is_clean(module), params=[p.detach() for p in module.model.parameters()]), out, rank)
