"`Mixing` and `MixMonitor` in a real `Trainer` on the digits: exact losses, each way out of a fit, precisions, two processes, checkpoints"
import logging, pickle, warnings
from collections import namedtuple
from copy import deepcopy
from io import BytesIO
from types import SimpleNamespace
import lightning.pytorch as pl, numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.schedule import SchedLin
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import SentenceEncoder
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from fastmix import _own_loss
from fastmix.lightning import Mixing, MixMonitor, batch_targets
from fastmix.log import mix_grids
from fastmix.losses import MultiLoss
from fastmix.manifold import ManifoldMixUp
from fastmix.mixers import CutMix, MixUp, OneOf
from fastmix.partners import SecondLoader, derange
from fastmix.plan import Plan
from helpers import begin_rank, class_dls, mk_learn, name_of, quiet_fit, run_ranks, save_rank

for name in 'lightning.pytorch','lightning.fabric': logging.getLogger(name).setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def digits(n=96):
    x,y = load_digits(return_X_y=True)
    return torch.tensor(x[:n]).float().view(-1, 1, 8, 8)/16,torch.tensor(y[:n])

class Shape:
    "Batches of a shape: how a sample is made, how inputs and targets are taken out, and where `Mixing` finds them"
    def __init__(self, make, take, **keys): self.make,self.take,self.keys = make,take,keys

Pair = namedtuple('Pair', 'x y')
def make_dict(x, y): return dict(img=x, label=y)
def take_dict(b): return b['img'],b['label']
as_dict = Shape(make_dict, take_dict)
as_tuple = Shape(lambda x,y: (x,y), lambda b: (b[0],b[1]))
as_pair = Shape(Pair, lambda b: (b.x,b.y))
with_keys = Shape(lambda x,y: dict(image=x, target=y, name='a'), lambda b: (b['image'],b['target']), x='image', y='target')
nested = Shape(lambda x,y: dict(views=[x,'left'], meta=dict(cls=y)), lambda b: (b['views'][0],b['meta']['cls']), x=('views',0), y=('meta','cls'))

def load(*columns, make=lambda *o: o, bs=16, **kwargs): return DataLoader([make(*o) for o in zip(*columns)], batch_size=bs, **kwargs)
def loader(shape=as_dict, shuffle=True): return load(*digits(), make=shape.make, shuffle=shuffle)

class Digits(pl.LightningModule):
    "Records what each step was called with, and what came out"
    def __init__(self, shape=as_dict, loss=None):
        super().__init__()
        torch.manual_seed(0)
        self.model,self.loss_func,self.shape,self.recs,self.seen = self.mk_model(),loss or nn.CrossEntropyLoss(),shape,[],[]
    def mk_model(self): return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    def forward(self, x): return self.model(x)
    def on_train_batch_start(self, batch, batch_idx): self.recs.append(dict(x0=self.shape.take(batch)[0].clone()))
    def training_step(self, batch, batch_idx):
        x,y = self.shape.take(batch)
        pred = self(x)
        loss = self.loss_func(pred, y)
        self.recs[-1].update(x=x, y=y, pred=pred.detach(), loss=loss.item(), plan=mixing(self).record.plan, scheduled=mixing(self).scheduled)
        return loss
    def other(self, kind, batch):
        x,y = self.shape.take(batch)
        self.seen.append((kind, self.loss_func))
        return self.loss_func(self(x), y)
    def validation_step(self, batch, batch_idx): self.other('sanity' if self.trainer.sanity_checking else 'valid', batch)
    def test_step(self, batch, batch_idx): self.other('test', batch)
    def predict_step(self, batch, batch_idx): self.other('predict', batch)
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=.1)

class Free(Digits):
    "`step` gets predictions and what follows the input in a batch"
    def training_step(self, batch, batch_idx): return self.step(self(batch[0]), *batch[1:])
    def on_train_batch_start(self, batch, batch_idx): pass

class Manual(Digits):
    automatic_optimization = False
    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        opts = self.optimizers()
        for opt in opts if isinstance(opts, list) else [opts]:
            opt.step()
            opt.zero_grad()

def mixing(module): return next(cb for cb in module.trainer.callbacks if isinstance(cb, Mixing))
quiet = dict(accelerator='cpu', devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
def fit(module, mixer, *callbacks, dl=None, valid=None, ckpt_path=None, keys={}, seed=1, **kwargs):
    cb = mixer if isinstance(mixer, Mixing) else Mixing(mixer, **module.shape.keys | keys)
    trainer = pl.Trainer(**{**quiet, 'max_epochs':2, **kwargs}, callbacks=[cb,*callbacks])
    if seed is not None: pl.seed_everything(seed, verbose=False)
    trainer.fit(module, dl or loader(module.shape), valid, ckpt_path=ckpt_path)
    return trainer

def parts(plan): return list(zip(plan.weights.expand(plan.pairs.shape).tolist(), plan.pairs.tolist()))
def sample_losses(o):
    "For each sample the losses on all targets in the mixture, by their weights"
    p = o['pred'].float()
    return torch.stack([sum(w*F.cross_entropy(p[i:i+1], o['y'][j:j+1]) for w,j in zip(ws, js)) for i,(ws,js) in enumerate(parts(o['plan']))])

def check_exact(module, n=12, atol=1e-6):
    assert len(module.recs)==n
    for o in module.recs:
        assert o['loss']==pytest.approx(sample_losses(o).mean().item(), abs=atol)
        want = torch.stack([sum(w*o['x0'][j] for w,j in zip(ws, js)) for ws,js in parts(o['plan'])])
        if o['plan'].region is None: assert torch.allclose(o['x'], want.to(o['x'].dtype), atol=1e-2 if o['x'].dtype==torch.bfloat16 else 1e-6)

def is_clean(module): return 'training_step' not in vars(module) and 'loss_func' not in vars(module) and type(module.loss_func) is nn.CrossEntropyLoss
def lams(*modules): return torch.stack([o['plan'].lam for m in modules for o in m.recs])
def unchanged(module, before): return is_clean(module) and all(before[k].equal(v) for k,v in module.state_dict().items())

# Exact, whatever is trained
@pytest.mark.parametrize('shape', [as_pair,with_keys,nested], ids=['namedtuple','keys','nested'])
def test_batches_of_any_shape(shape):
    module = Digits(shape)
    fit(module, MixUp(1.))
    check_exact(module)
    assert is_clean(module)

@pytest.mark.parametrize('mixer', [MixUp(1., per_batch=True), MixUp(1., k=3), CutMix(), OneOf(MixUp(1.), CutMix(), None, per_batch=False),
    MixUp(1., p=.5, partners=derange, soft=True), MixUp(0)], ids=name_of)
def test_every_mixer(mixer):
    module = Digits()
    fit(module, mixer)
    check_exact(module)

class Function(Digits):
    loss_func = staticmethod(F.cross_entropy)
    def __init__(self):
        pl.LightningModule.__init__(self)
        torch.manual_seed(0)
        self.model,self.shape,self.recs = self.mk_model(),as_dict,[]
class Method(Function):
    def loss_func(self, pred, y): return F.cross_entropy(pred, y)

@pytest.mark.parametrize(('cls','n_lam'), [(Function,16),(Method,1)])
def test_functions_and_methods_as_losses(cls, n_lam):
    "A method has no reduction to leave out, and so gets one λ for the batch"
    module = cls()
    fit(module, MixUp(1.))
    check_exact(module)
    assert 'loss_func' not in vars(module) and lams(module).shape[1]==n_lam

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

def test_all_but_training_sees_the_module_s_own_loss():
    module,valid = Digits(),loader(shuffle=False)
    own = module.loss_func
    trainer = fit(module, MixUp(1.), valid=valid, num_sanity_val_steps=1)
    trainer.validate(module, valid, verbose=False)
    trainer.test(module, valid, verbose=False)
    trainer.predict(module, valid)
    assert {kind for kind,_ in module.seen}=={'sanity','valid','test','predict'}
    assert all(loss is own for _,loss in module.seen) and is_clean(module)
    check_exact(module)

def test_a_mixer_that_a_fastai_learner_has_too():
    "It stays with the learner, and mixes for both"
    learn,module = mk_learn(class_dls(), cbs=(mixer := MixUp(1.))),Digits()
    fit(module, mixer)
    check_exact(module)
    quiet_fit(learn)
    assert mixer.learn is learn

class Stop(pl.Callback):
    "Raises `error` the third time that `event` happens"
    def __init__(self, event, error=ValueError('stop')): self.event,self.error,self.n = event,error,0
    def __getattribute__(self, name):
        if name.startswith('on_') and name==object.__getattribute__(self, 'event'): return self.fail
        return object.__getattribute__(self, name)
    def fail(self, *args, **kwargs):
        self.n += 1
        if self.n==3: raise self.error

@pytest.mark.parametrize(('event','error'), [('on_train_batch_start',ValueError), ('on_before_backward',ValueError), ('on_after_backward',KeyboardInterrupt),
    ('on_train_batch_end',ValueError), ('on_validation_batch_end',ValueError), ('training_step',RuntimeError), ('training_step',KeyboardInterrupt)])
def test_each_way_out_of_a_fit(event, error):
    class Fails(Digits):
        fails = True
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.fails and event=='training_step' and batch_idx==2: raise error('stop')
            return loss
    module,mixer = Fails(),MixUp(1.)
    with pytest.raises((ValueError,RuntimeError,SystemExit)): fit(module, mixer, Stop(event, error('stop')), valid=loader(shuffle=False))
    assert is_clean(module)
    module.recs,module.fails = [],False
    fit(module, mixer, valid=loader(shuffle=False))
    check_exact(module)

# Ways to train
@pytest.mark.parametrize(('precision','dtype','atol'), [('bf16-mixed',torch.float32,1e-2), ('bf16-true',torch.bfloat16,2e-2)])
def test_bf16(precision, dtype, atol):
    module = Digits()
    fit(module, MixUp(1.), precision=precision)
    assert {o['x'].dtype for o in module.recs}=={dtype} and module.recs[0]['pred'].dtype==torch.bfloat16
    check_exact(module, atol=atol)

def test_accumulated_gradients():
    "As in a loop that adds up the exact gradients of three batches"
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

@pytest.mark.parametrize('mixer', [MixUp(1.),ManifoldMixUp(1., layers='model.2')], ids=name_of)
def test_a_step_that_is_computed_twice_is_computed_on_one_mixture(mixer):
    class Twice(Digits):
        def configure_optimizers(self): return torch.optim.LBFGS(self.parameters(), lr=.1, max_iter=3)
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.recs[-1].setdefault('lams', []).append(self.recs[-1]['plan'].lam)
            return loss
    module = Twice()
    fit(module, mixer)
    assert all(len(o['lams'])>1 and all(map(o['lams'][0].equal, o['lams'])) for o in module.recs)
    assert not module.recs[0]['lams'][0].equal(module.recs[1]['lams'][0])
    assert all(o['loss']==pytest.approx(sample_losses(o).mean().item(), abs=1e-6) for o in module.recs)

def test_manual_optimization():
    module = Manual()
    fit(module, MixUp(1.))
    check_exact(module)

def test_a_training_step_without_batch_idx():
    class Short(Digits):
        def training_step(self, batch): return super().training_step(batch, 0)
    module = Short()
    fit(module, MixUp(1.))
    check_exact(module)

@pytest.mark.parametrize('mixer', [MixUp(1.),ManifoldMixUp(1., layers='model.2')], ids=name_of)
def test_a_batch_that_is_left_out(mixer):
    class Skips(Digits):
        def training_step(self, batch, batch_idx): return super().training_step(batch, batch_idx) if batch_idx%2 else None
    module = Skips()
    fit(module, mixer)
    assert sum('loss' in o for o in module.recs)==6

def test_beside_a_callback_that_copies_the_module():
    module = Digits()
    fit(module, MixUp(1.), StochasticWeightAveraging(swa_lrs=.05, swa_epoch_start=1), max_epochs=3)
    check_exact(module, 18)

def test_after_the_learning_rate_was_searched():
    module,cb = Digits(),Mixing(MixUp(1.))
    module.lr = .1
    trainer = pl.Trainer(**{**quiet, 'max_epochs':2}, callbacks=[cb])
    pl.tuner.Tuner(trainer).lr_find(module, loader(), num_training=5, attr_name='lr')
    module.recs = []
    trainer.fit(module, loader())
    check_exact(module)

# Seeds, checkpoints and schedules
def test_resumed_as_if_not_interrupted(tmp_path):
    "Also after half an epoch, where Lightning itself restarts the epoch's data"
    whole,dl = Digits(),loader(shuffle=False)
    fit(whole, MixUp(1.), ModelCheckpoint(tmp_path, filename='{step}', save_top_k=-1, every_n_train_steps=4), dl=dl, max_epochs=4, enable_checkpointing=True)
    for step in 8,12:
        rest = Digits()
        fit(rest, MixUp(1.), dl=dl, max_epochs=4, ckpt_path=tmp_path/f'step={step}.ckpt', seed=99)
        assert len(rest.recs)==24-step
        for o,p in zip(whole.recs[step:], rest.recs): assert o['plan'].lam.equal(p['plan'].lam) and o['plan'].idx.equal(p['plan'].idx)
        assert step%6 or all(torch.allclose(p, q, atol=1e-6) for p,q in zip(whole.parameters(), rest.parameters()))

def test_the_same_after_the_same_seed_and_else_another():
    a,b,c = Digits(),Digits(),Digits()
    for o in a,b: fit(o, MixUp(1.))
    cb = Mixing(MixUp(1.))
    for _ in range(2): fit(c, cb, seed=None)
    assert all(o['x'].equal(p['x']) for o,p in zip(a.recs, b.recs))
    assert len(lams(a, c).unique(dim=0))==36

def test_a_checkpoint_that_is_only_validated():
    "The next fit does not repeat its random numbers"
    module,cb = Digits(),Mixing(MixUp(1.))
    trainer = fit(module, cb)
    trainer.save_checkpoint('x.ckpt')
    trainer.validate(module, loader(shuffle=False), ckpt_path='x.ckpt', verbose=False, weights_only=False)
    fit(module, cb, seed=None)
    assert len(lams(module).unique(dim=0))==24

def test_numbers_of_the_training_are_left_alone():
    "With alpha=0, training is bit for bit that without a mixer, and mixing draws nothing from the global generators"
    class Unmixed(Digits):
        def training_step(self, batch, batch_idx): return self.loss_func(self(batch['img']), batch['label'])
    unmixed,module = Unmixed(),Digits()
    pl.seed_everything(1, verbose=False)
    pl.Trainer(**quiet, max_epochs=2).fit(unmixed, loader())
    after = torch.get_rng_state()
    fit(module, MixUp(0))
    assert all(p.equal(q) for p,q in zip(unmixed.parameters(), module.parameters()))
    fit(Digits(), MixUp(1.))
    assert torch.get_rng_state().equal(after)

def test_pickled_and_copied():
    fit(Digits(), cb := Mixing(MixUp(.3), x='img'))
    for o in pickle.loads(pickle.dumps(cb)),deepcopy(cb): assert (o.mixer.alpha,o.keys.x,o.seed) == (.3,'img',cb.seed)

@pytest.mark.parametrize('n_opt', [1,2])
def test_schedules_follow_the_batches(n_opt):
    "Also where a batch has two optimizer steps"
    class Several(Manual):
        def configure_optimizers(self): return [torch.optim.SGD(self.parameters(), lr=.1) for _ in range(n_opt)]
    module = Several()
    fit(module, MixUp(SchedLin(.2, 1.), until=.5))
    assert [o['scheduled']['alpha'] for o in module.recs]==pytest.approx([.2+.8*i/12 for i in range(12)])
    assert [(o['plan'].lam<1).any().item() for o in module.recs]==[True]*6+[False]*6

# Inputs
def test_integers_are_looked_up_and_mixed():
    "By a part of a part of the module, without its `forward`"
    class Ints(Digits):
        def mk_model(self): return nn.Sequential(nn.Sequential(nn.Embedding(17, 4), nn.Flatten()), nn.Linear(256, 10))
        def __call__(self, x): return self.model[1](self.model[0](x.flatten(1)))
    x,y = digits()
    module = Ints()
    fit(module, MixUp(1.), dl=load((16*x).long(), y, make=make_dict), max_epochs=1, max_steps=1)
    (o,),m = module.recs,Ints().model
    e,lam = m[0](o['x0'].flatten(1)),o['plan'].lam[:,None]
    assert torch.allclose(o['pred'], m[1](lam*e + (1-lam)*e[o['plan'].idx]), atol=1e-5)
    assert o['loss']==pytest.approx(sample_losses(o).mean().item(), abs=1e-5)

def test_integers_that_are_not_looked_up():
    "They are an error before any training step"
    class Averages(Digits):
        def forward(self, x): return self.model(x.float())
    x,y = digits()
    module = Averages()
    before = deepcopy(module.state_dict())
    with pytest.raises(TypeError, match='look them up in an nn.Embedding'): fit(module, MixUp(1.), dl=load((16*x).long(), y, make=make_dict))
    assert unchanged(module, before)

def test_hidden_layers():
    "Where `training_step` calls a part of the module, without its `forward`"
    class Part(Digits):
        def __call__(self, x): return self.model(x)
    module = Part()
    fit(module, ManifoldMixUp(1., layers='model.2'), max_steps=1, max_epochs=1)
    o,m = module.recs[0],Part().model
    h,lam = m[:3](o['x0']),o['plan'].lam[:,None]
    assert torch.allclose(o['pred'], m[3](lam*h + (1-lam)*h[o['plan'].idx]), atol=1e-5)

def test_hidden_layers_of_another_input_are_not_mixed():
    class Other(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            other = torch.rand(16, 1, 8, 8)
            with torch.no_grad(): got,want = self(other),F.linear(self.model[1](other.flatten(1)).relu(), self.model[3].weight, self.model[3].bias)
            assert torch.allclose(got, want, atol=1e-6)
    fit(Other(), ManifoldMixUp(1., layers='model.2'))

@pytest.mark.parametrize('use_reentrant', [True,False])
def test_checkpointed_hidden_layers(use_reentrant):
    "They have the gradients of layers without checkpoints"
    class Checkpointed(Digits):
        saves = True
        def forward(self, x):
            x.requires_grad_()
            f = self.model[:3]
            return self.model[3](checkpoint(f, x, use_reentrant=use_reentrant) if self.saves else f(x))
    class Not(Checkpointed): saves = False
    both = Checkpointed(),Not()
    for module in both: fit(module, ManifoldMixUp(1., layers='model.2'))
    for p,q in zip(*(o.parameters() for o in both)): assert torch.allclose(p, q, atol=1e-6)

# Partners from a second loader
def test_partners_from_a_second_loader():
    x,y = digits()
    second = load(x, torch.zeros_like(y), shuffle=True, generator=torch.Generator().manual_seed(3))
    module = Digits()
    fit(module, MixUp(1., partners=SecondLoader(second)))
    for o in module.recs:
        p,lam = o['pred'],o['plan'].lam
        want = lam*F.cross_entropy(p, o['y'], reduction='none') + (1-lam)*F.cross_entropy(p, 0*o['y'], reduction='none')
        assert o['loss']==pytest.approx(want.mean().item(), abs=1e-5)

@pytest.mark.parametrize(('shape','hook','precision'), [(as_dict,'on_before_batch_transfer','32-true'), (as_tuple,'on_after_batch_transfer','32-true'),
    (as_tuple,'on_after_batch_transfer','64-true')], ids=range(3))
def test_partners_pass_the_hooks_that_batches_pass(shape, hook, precision):
    class Shifts(Digits): pass
    def shift(self, batch, dataloader_idx):
        x,y = self.shape.take(batch)
        return self.shape.make(x+10, y)
    setattr(Shifts, hook, shift)
    module = Shifts(shape)
    fit(module, MixUp(1., partners=SecondLoader(loader(shape))), precision=precision)
    assert all(o['x'].min()>=10-1e-4 and not o['x'].equal(o['x0']) for o in module.recs)

# Targets that are numbers are blended
def test_numbers_in_front_as_targets():
    "The target of a tuple, where a mistake would not be noticed later"
    front = Shape(lambda x,y: (y,x), lambda b: (b[1],b[0]), y=0)
    class Front(Digits):
        def forward(self, x): return self.model(x)[:,0]
    x,y = digits()
    module = Front(front, loss=nn.MSELoss())
    fit(module, MixUp(1.), dl=load(y.float(), x), max_epochs=1)
    for o,i in zip(module.recs, range(0, 96, 16)):
        lam,idx,y0 = o['plan'].lam,o['plan'].idx,y[i:i+16].float()
        assert torch.allclose(o['y'], lam*y0 + (1-lam)*y0[idx], atol=1e-5)
        lam = lam[:,None,None,None]
        assert torch.allclose(o['x'], lam*o['x0'] + (1-lam)*o['x0'][idx], atol=1e-6)
        assert o['loss']==pytest.approx((o['pred']-o['y']).square().mean().item(), rel=1e-5)

@pytest.mark.filterwarnings('error:training_step calls')
@pytest.mark.parametrize('f', [lambda y: y[:,None], lambda y: y.double()], ids=['view','double'])
def test_what_is_computed_of_numbers_is_no_other_target(f):
    class Numbers(Free):
        def step(self, pred, y): return self.loss_func(f(pred[:,0]), f(y))
    x,y = digits()
    fit(Numbers(as_tuple, loss=nn.MSELoss()), MixUp(1.), dl=load(x, y.float()))

def test_other_numbers_than_those_that_were_mixed():
    class Other(Free):
        def step(self, pred, other, y): return self.loss_func(pred[:,0], other)
    x,y = digits()
    with pytest.warns(UserWarning, match='with other targets than those that MixUp.* has mixed'): fit(Other(as_tuple, loss=nn.MSELoss()), MixUp(1.), dl=load(x, y.float()+1, y.float()), keys=dict(x=0, y=2))

# Several calls of the loss
def masks(n=32):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, 4, 4, generator=g),torch.randint(0, 10, (n,4,4), generator=g),torch.rand(n, 4, 4, generator=g)

class Dense(Free):
    "A prediction for each pixel"
    def mk_model(self): return nn.Conv2d(1, 10, 1)

def test_a_call_of_the_loss_with_a_part_is_an_error():
    class Deep(Dense):
        def step(self, p, y): return self.loss_func(p, y) + .5*self.loss_func(F.avg_pool2d(p, 2), y[:,::2,::2])
    x,y,_ = masks()
    with pytest.raises(RuntimeError, match=r'calls self.loss_func more than once.*as in self.loss_func\(\(pred,other_pred\), y\)'): fit(Deep(as_tuple), MixUp(1.), dl=load(x, y))

class Weighted(Digits):
    def training_step(self, batch, batch_idx):
        x,y = self.shape.take(batch)
        return (self.loss_func(self(x), y)*(1+y)).mean()

def test_a_mean_that_the_step_makes_of_the_losses_of_samples():
    module = Weighted(loss=nn.CrossEntropyLoss(reduction='none'))
    before = {k: v.clone() for k,v in module.state_dict().items()}
    with pytest.raises(RuntimeError, match='trains on targets of a mixed batch outside'): fit(module, MixUp(1.))
    assert all(before[k].equal(v) for k,v in module.state_dict().items())

class Hardest(Digits):
    "Trains on the hardest mixtures, whatever their labels"
    def training_step(self, batch, batch_idx):
        x,y = self.shape.take(batch)
        pred = self(x)
        plan,u = mixing(self).record.plan,self.loss_func(pred, y)
        want = plan.lam*F.cross_entropy(pred, y, reduction='none') + (1-plan.lam)*F.cross_entropy(pred, y[plan.idx], reduction='none')
        torch.testing.assert_close(u, want)
        return u.topk(4).values.mean()

def test_losses_of_samples_that_the_step_reduces_without_labels(): fit(Hardest(loss=nn.CrossEntropyLoss(reduction='none')), MixUp(1.))

def test_a_call_of_the_loss_with_other_targets_is_a_warning():
    "Such as domains, or the output of a teacher: they may happen to equal the targets"
    class Two(Dense):
        def step(self, p, y): return self.loss_func(p, y) + .1*self.loss_func(p, torch.zeros_like(y))
    x,y,_ = masks()
    with pytest.warns(UserWarning, match='with other targets.*pass where'): fit(Two(as_tuple), MixUp(1.), dl=load(x, y*0))

def test_deep_supervision_by_one_loss():
    "The way out that the error names"
    def deep(preds, y, reduction='mean'):
        u = [F.cross_entropy(p, t, reduction='none').flatten(1).mean(1) for p,t in zip(preds, (y,y[:,::2,::2]))]
        return u[0]+.5*u[1] if reduction=='none' else (u[0]+.5*u[1]).mean()
    class Deep(Dense):
        def step(self, p, y):
            preds = p,F.avg_pool2d(p, 2)
            loss,plan = self.loss_func(preds, y),mixing(self).record.plan
            want = [deep(preds, y[i], 'none') for i in plan.pairs.T]
            self.recs.append((loss.item(), (plan.lam*want[0] + (1-plan.lam)*want[1]).mean().item()))
            return loss
    x,y,_ = masks()
    module = Deep(as_tuple, loss=deep)
    fit(module, MixUp(1.), dl=load(x, y))
    assert len(module.recs)==4 and all(a==pytest.approx(b, abs=1e-6) for a,b in module.recs)

# Errors
def test_losses_that_are_not_there():
    for name in 'criterion','losses.x.y','shape':
        with pytest.raises(ValueError, match=f"Digits has no loss '{name}' to mix.*Losses among its attributes: loss_func.*are mixed without a name"): fit(Digits(), MixUp(1.), keys=dict(loss=name))

def step_of(f):
    class Step(Digits):
        def __init__(self):
            super().__init__()
            self.losses = nn.ModuleDict(dict(cls=self.loss_func))
        @property
        def criterion(self): return self.losses['cls']
        def training_step(self, batch, batch_idx): return f(self, self(batch['img']), batch['label'])
    return Step()

@pytest.mark.parametrize(('f','loss'), [(lambda self,p,y: F.cross_entropy(p, y), 'loss_func'), (lambda self,p,y: self.loss_func(p, y.clone()), 'loss_func'),
    (lambda self,p,y: self.loss_func(p, y.view(-1)), 'loss_func'), (lambda self,p,y: self.losses['cls'](p, y), 'losses.cls'),
    (lambda self,p,y: self.criterion(p, y), 'criterion')], ids=['function','clone','view','in a dict','property'])
def test_a_loss_that_was_not_mixed_is_an_error(f, loss):
    module = step_of(f)
    before = deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=rf'training_step has not called self.{loss} with the targets as they are.*or name the loss that it calls'): fit(module, MixUp(1.), keys=dict(loss=loss))
    assert unchanged(module, before)

@pytest.mark.parametrize('f', [lambda self,p,y: F.cross_entropy(p, y), lambda self,p,y: self.losses['cls'](p, y),
    lambda self,p,y: nn.CrossEntropyLoss()(p, y.view(-1))], ids=['function','in a dict','made anew'])
@pytest.mark.parametrize('mixer', [MixUp(1.), CutMix()], ids=repr)
def test_losses_that_have_no_name(f, mixer):
    class Step(Digits):
        def __init__(self):
            super().__init__()
            self.losses = nn.ModuleDict(dict(cls=self.loss_func))
            del self.loss_func
        def training_step(self, batch, batch_idx):
            pred,y = self(batch['img']),batch['label']
            loss,plan = f(self, pred, y),mixing(self).record.plan
            u = [-pred.detach().log_softmax(1)[range(len(y)),o] for o in (y,y[plan.idx])]
            self.recs[-1].update(loss=loss.item(), want=(plan.lam*u[0] + (1-plan.lam)*u[1]).mean().item())
            return loss
    module = Step()
    fit(module, mixer)
    assert all(o['loss']==pytest.approx(o['want'], rel=1e-5) for o in module.recs)

def test_classes_that_are_not_named():
    "A second target of the batch, which keeps its own labels"
    class Two(Digits):
        def __init__(self):
            super().__init__()
            del self.loss_func
        def training_step(self, batch, batch_idx):
            pred = self(batch['img'])
            return F.cross_entropy(pred, batch['label']) + F.cross_entropy(2*pred, batch['other'])
    x,y = digits()
    with pytest.warns(UserWarning, match='calls a loss of torch.nn.functional with other targets.*pass where'): fit(Two(), MixUp(1.), dl=load(x, y, y.clone(), make=lambda x,y,z: dict(img=x, label=y, other=z)), keys=dict(x='img', y='label'))

def test_masks_that_are_taken_for_an_input():
    "Masks of bytes could be images; weights follow them in the batch"
    class Weighed(Dense):
        def step(self, p, y, w): return self.loss_func(p, y.long())
    x,y,w = masks()
    with pytest.raises(ValueError, match='A batch of 3 may hold'): fit(Weighed(as_tuple), MixUp(1.), dl=load(x, y.byte(), w))
    with pytest.raises(ValueError, match='with integers that MixUp.* has taken for an input'): fit(Weighed(as_tuple), MixUp(1.), dl=load(x, y.byte(), w), keys=dict(x=[0,1], y=2))

def test_two_mixers():
    class Mine(Mixing): pass
    with pytest.raises(ValueError, match='more than one Mixing.*combine them'): fit(Digits(), MixUp(1.), Mine(CutMix()))

def test_what_else_is_wrong_before_training():
    module = Digits()
    before = deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="'image' is not in a dict with the keys 'img', 'label'"): fit(module, MixUp(1.), keys=dict(x='image'))
    with pytest.raises(ValueError, match=r'length of the training must be known: pass the Trainer max_epochs'): fit(module, MixUp(SchedLin(.1, 1.)), max_epochs=-1)
    with pytest.raises(TypeError, match=r'mixer must be one of fastmix.* as in Mixing\(MixUp\(.4\)\)'): Mixing(.4)
    assert unchanged(module, before)

# Images
def read(folder):
    file, = folder.rglob('events*')
    return EventAccumulator(str(file), dict.fromkeys(['images','histograms','scalars','tensors'], 0)).Reload()

def image(event): return np.asarray(Image.open(BytesIO(event.encoded_image_string))).astype(float)/255
def text(log): return [o.tensor_proto.string_val[0].decode() for o in log.Tensors('mix/targets/text_summary')]

def test_images_in_tensorboard(tmp_path):
    module,vocab = Digits(),'abcdefghij'
    fit(module, MixUp(SchedLin(.2, 1.)), MixMonitor(vocab=list(vocab)), logger=TensorBoardLogger(tmp_path))
    log = read(tmp_path)
    for epoch in 0,1:
        o = module.recs[6*epoch]
        for name,grid in mix_grids(o['x0'][:9], o['x'][:9]).items():
            event = log.Images(f'mix/{name}')[epoch]
            assert event.step==6*epoch+1 and abs(image(event)-grid.permute(1,2,0).numpy()).max()<1/255
        i = o['plan'].lam[:9].argmin()
        lam,a,b = o['plan'].lam[i],o['y'][i],o['y'][o['plan'].idx[i]]
        assert f'| {i+1} | {lam:.2f} {vocab[a]} + {1-lam:.2f} {vocab[b]} |' in text(log)[epoch]
        h = log.Histograms('mix/lam')[epoch].histogram_value
        assert h.sum==pytest.approx(sum(p['plan'].lam.sum().item() for p in module.recs[6*epoch:6*epoch+6]), abs=1e-3)
    assert [(o.step,o.value) for o in log.Scalars('mix/alpha')]==[(i+1,pytest.approx(.2+.8*i/12)) for i in range(12)]

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

def test_images_of_a_resumed_epoch(tmp_path):
    dl = loader(shuffle=False)
    fit(Digits(), MixUp(1.), ModelCheckpoint(tmp_path, filename='{step}', save_top_k=-1, every_n_train_steps=4), dl=dl, enable_checkpointing=True)
    fit(Digits(), MixUp(1.), MixMonitor(every=1), dl=dl, ckpt_path=tmp_path/'step=8.ckpt', logger=TensorBoardLogger(tmp_path))
    assert [o.step for o in read(tmp_path).Images('mix/mixed')]==[9,10,11,12]

def test_labels_without_a_name(tmp_path):
    x,y = digits()
    fit(Digits(), MixUp(1.), MixMonitor(vocab=np.array(['a','b'])), dl=load(x, torch.where(y==1, -100, y), make=make_dict), logger=TensorBoardLogger(tmp_path))
    assert '-100' in text(read(tmp_path))[0]

def test_lam_of_an_interrupted_fit_is_not_of_the_next(tmp_path):
    monitor = MixMonitor()
    with pytest.raises(ValueError): fit(Digits(), MixUp(1.), monitor, Stop('on_after_backward'), logger=TensorBoardLogger(tmp_path/'0'))
    fit(Digits(), MixUp(1.), monitor, logger=TensorBoardLogger(tmp_path/'1'))
    assert [o.histogram_value.num for o in read(tmp_path/'1').Histograms('mix/lam')]==[96,96]

def test_what_a_monitor_needs(tmp_path):
    module = Digits()
    for logger,match in [(CSVLogger(tmp_path),'it has CSVLogger'),(False,'it has none')]:
        with pytest.raises(ValueError, match=match): fit(module, MixUp(1.), MixMonitor(), logger=logger)
    with pytest.raises(ValueError, match='no mixer to report on'): pl.Trainer(**{**quiet, 'logger':TensorBoardLogger(tmp_path)}, callbacks=MixMonitor()).fit(module, loader())
    assert not module.recs

# Two processes
@pytest.fixture(scope='module')
def ranks(tmp_path_factory): return run_ranks(__file__, tmp_path_factory.mktemp('lightning'))

def test_two_processes(ranks):
    "Each rank's losses are exact, ranks mix differently, and the parameters move as by the mean over both"
    a,b = ranks
    for o in a['recs']+b['recs']: o['plan'] = Plan.of(o['idx'], o['lam'])
    model = Digits().model
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for steps in zip(a['recs'], b['recs'], strict=True):
        for o in steps: assert o['loss']==pytest.approx(sample_losses(o).mean().item(), abs=1e-5)
        assert not steps[0]['lam'].equal(steps[1]['lam']) and not steps[0]['x0'].equal(steps[1]['x0'])
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

# Metrics in `training_step`
class Scores(Digits):
    "Accuracy of each label by its weight; of other batches, accuracy"
    def training_step(self, batch, batch_idx):
        x,y = self.shape.take(batch)
        pred = self(x)
        self.score = sum((w*(pred.argmax(1)==y)).sum() for y,w in batch_targets(self.trainer, y)).item()/len(pred)
        hits = (pred.argmax(1)[:,None]==y[(plan := mixing(self).record.plan).pairs])
        assert self.score==pytest.approx((plan.sample_weights*hits).sum().item()/len(pred), abs=1e-6)
        return self.loss_func(pred, y)
    def validation_step(self, batch, batch_idx):
        y = self.shape.take(batch)[1]
        ((got,w),) = batch_targets(self.trainer, y)
        assert got is y and w==1.

def test_labels_and_weights_for_metrics(): fit(Scores(), MixUp(1.), valid=loader())

def test_blended_labels_are_not_blended_for_metrics():
    class Several(Digits):
        def training_step(self, batch, batch_idx):
            x,y = self.shape.take(batch)
            (own,w),(partners,w1) = batch_targets(self.trainer, y)
            assert not y.equal(y.round()) and own.equal(own.round())
            torch.testing.assert_close(w[:,None]*own + w1[:,None]*partners, y)
            return self.loss_func(self(x), y)
    x,y = digits()
    fit(Several(loss=nn.BCEWithLogitsLoss()), MixUp(1.), dl=load(x, F.one_hot(y, 10).float(), make=make_dict))

# What says what to write
def test_a_mixer_without_mixing():
    with pytest.raises(TypeError, match=r'MixUp\(0.4\) is a callback of fastai: write Trainer\(callbacks=\[Mixing\(MixUp\(0.4\)\)\]'):
        pl.Trainer(**quiet, max_epochs=1, callbacks=[MixUp(.4)]).fit(Digits(), loader())

def test_two_mixings():
    with pytest.raises(ValueError, match='more than one Mixing.*combine them'): fit(Digits(), MixUp(.4), Mixing(CutMix()))

@pytest.mark.parametrize('look_up', [lambda s,x: s.bias(x[:,0])[:,0], lambda s,x: s.param[x[:,0]], lambda s,x: s.bias.forward(x[:,1])[:,0]], ids=['column','parameter','forward'])
def test_every_look_up_is_mixed_or_refused(look_up):
    class Recommender(Digits):
        def mk_model(self):
            self.bias,self.param = nn.Embedding(20, 1),nn.Parameter(torch.rand(20))
            return nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(8, 10))
        def forward(self, x): return self.model(x) + look_up(self, x)[:,None]
    x,y = torch.randint(0, 20, (32,2)),torch.arange(32)%10
    module = Recommender()
    fit(module, MixUp(1.), dl=load(x, y, make=make_dict), max_epochs=1, max_steps=1)
    (o,),m = module.recs,Recommender()
    def both(f): return sum(w[:,None]*f(o['x0'][j]) for w,j in zip(o['plan'].sample_weights.unbind(1), o['plan'].pairs.unbind(1)))
    want = m.model[2](both(lambda x: m.model[:2](x))) + both(lambda x: look_up(m, x)[:,None])
    assert torch.allclose(o['pred'], want, atol=1e-5)

def test_a_layer_that_was_called_for_another_input_first():
    class First(Digits):
        def mk_model(self):
            self.flat,self.deep = nn.Flatten(),nn.Linear(64, 16)
            return nn.Sequential(nn.ReLU(), nn.Linear(16, 10))
        def __call__(self, x):
            h = self.flat(x)
            self.deep(torch.rand(16, 64))
            return self.model(self.deep(h))
    with pytest.raises(TypeError, match='is called more than once'): fit(First(), ManifoldMixUp(1., layers='deep'))

class TwoLosses(Digits):
    "The mixed loss is logged, and another one is trained"
    def training_step(self, batch, batch_idx):
        x,y = self.shape.take(batch)
        pred = self(x)
        self.loss_func(pred, y)
        return self.finish(F.cross_entropy(pred, y))
    def finish(self, loss): return loss

class Returns(TwoLosses):
    def finish(self, loss): return dict(loss=loss)

class Backward(TwoLosses):
    automatic_optimization = False
    def finish(self, loss): self.manual_backward(loss)

@pytest.mark.parametrize('cls', [TwoLosses, Returns, Backward])
def test_another_loss_that_is_trained(cls):
    with pytest.raises(RuntimeError, match='trains another loss.*return what self.loss_func returns'): fit(cls(), MixUp(1.))

def test_what_is_added_to_the_mixed_loss():
    class Adds(TwoLosses):
        def training_step(self, batch, batch_idx):
            x,y = self.shape.take(batch)
            pred = self(x)
            return dict(loss=self.loss_func(pred, y)/2 + pred.square().mean())
    fit(Adds(), MixUp(1.))

class Margin(TwoLosses):
    "A head that looks at the labels, as ArcFace does"
    def training_step(self, batch, batch_idx):
        x,y = self.shape.take(batch)
        return self.finish(self.loss_func(self.logits(self(x), y), y), y)
    def logits(self, pred, y): return pred - .5*F.one_hot(y, 10)
    def finish(self, loss, y): return loss

class Scattered(Margin):
    def logits(self, pred, y): return pred.scatter_add(1, y[:,None], torch.full_like(pred, -.5))

class Written(Margin):
    def logits(self, pred, y):
        pred[range(len(y)),y] -= .5
        return pred

class Forced(Margin):
    "A decoder that reads the labels"
    def mk_model(self):
        self.emb = nn.Embedding(10, 10)
        return super().mk_model()
    def logits(self, pred, y): return pred + self.emb(y)

class Weights(Margin):
    "The mixed mean, by a weight that the labels decide"
    def logits(self, pred, y): return pred
    def finish(self, loss, y): return loss*(y==3).float().mean()

class Center(Margin):
    "A second loss of the labels"
    def logits(self, pred, y): return pred
    def finish(self, loss, y): return loss + .1*self.model[-1].weight[y].square().mean()

@pytest.mark.parametrize('cls', [Margin,Scattered,Written,Forced,Weights,Center])
def test_what_is_trained_on_labels_beside_the_loss(cls):
    module = cls()
    before = deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match='trains on targets of a mixed batch outside of the loss'): fit(module, MixUp(1.))
    assert unchanged(module, before)

class Several(Digits):
    "Labels that are blended, and a second loss of what the step makes of them"
    def training_step(self, batch, batch_idx):
        x,y = self.shape.take(batch)
        pred = self(x)
        return self.loss_func(pred, y) + self.other(pred, y)
class Rounded(Several):
    def other(self, pred, y): return F.binary_cross_entropy_with_logits(pred[:,0], (y.sum(1)>.5).float())
class Linear(Several):
    def other(self, pred, y): return F.l1_loss(pred.mean(1), y.mean(1)) + F.huber_loss(pred, 2*y-1)

def test_blended_targets_that_are_rounded():
    x,y = digits()
    def train(cls): fit(cls(as_tuple, loss=nn.BCEWithLogitsLoss()), MixUp(1.), dl=load(x, F.one_hot(y, 10).float()))
    with pytest.raises(RuntimeError, match='trains on targets of a mixed batch outside'): train(Rounded)
    train(Linear)

def test_what_is_only_logged_may_use_the_labels():
    class Logs(Margin):
        def logits(self, pred, y):
            self.log('margin', (pred*F.one_hot(y, 10)).sum(1).mean())
            self.log('accuracy', (pred.argmax(1)==y).float().mean())
            self.log('other', F.cross_entropy(pred, y))
            return pred
    fit(Logs(), MixUp(1.))

def test_several_targets_for_metrics():
    class Both(Digits):
        def training_step(self, batch, batch_idx):
            x,y,z = batch
            own = batch_targets(self.trainer, z)
            assert len(own)==2 and [o for o,_ in own][0].equal(z) and [o[0] for o,_ in batch_targets(self.trainer, z, y)][0].equal(z)
            with pytest.raises(ValueError, match='the same objects'): batch_targets(self.trainer, y.clone())
            return self.loss_func((self(x),self(x)), y, z)
    x,y = digits()
    fit(Both(as_tuple, loss=MultiLoss(nn.CrossEntropyLoss(), nn.CrossEntropyLoss())), MixUp(1.), dl=load(x, y, y.flip(0)), keys=dict(x=0, y=[1,2]))

class AttrDict(dict):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self

def test_a_batch_whose_values_are_attributes():
    x,y = digits()
    class Attributes(Digits):
        def training_step(self, batch, batch_idx):
            assert batch.img is batch['img'] and batch.img.equal(mixing(self).record.mixed_xb[0]) and not any(o.equal(batch.img[0]) for o in x)
            return self.loss_func(self(batch.img), batch.label)
    def collate(b): return AttrDict(img=torch.stack([o for o,_ in b]), label=torch.stack([o for _,o in b]))
    fit(Attributes(), MixUp(1.), dl=DataLoader(list(zip(x, y)), 16, collate_fn=collate))

def test_a_layer_with_a_way_around_it():
    class Wide(Digits):
        def mk_model(self):
            self.wide = nn.Linear(64, 10)
            return super().mk_model()
        def forward(self, x): return self.model(x) + self.wide(x.flatten(1))
    with pytest.raises(ValueError, match='no way around'): fit(Wide(), ManifoldMixUp(1., layers='model.2'))

def test_a_module_whose_step_reshapes_its_inputs():
    class Flat(Digits):
        def mk_model(self): return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        def training_step(self, batch, batch_idx):
            x,y = self.shape.take(batch)
            return self.loss_func(self.model(x.flatten(1)), y)
    with pytest.raises(RuntimeError, match='did not reach its layer'): fit(Flat(), ManifoldMixUp(1., layers='model.0'))

class Texts(pl.LightningModule):
    "Texts padded with 0, and what belongs to their rows; `change` writes to the labels"
    def __init__(self, change=None):
        super().__init__()
        torch.manual_seed(0)
        self.emb,self.lin,self.loss_func,self.change,self.seen = nn.Embedding(30, 8, padding_idx=0),nn.Linear(8, 4),nn.CrossEntropyLoss(),change,[]
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.)
    def training_step(self, batch, batch_idx):
        ids,*others,y = batch
        if self.change: self.change(y)
        self.seen.append((others, self.trainer.callbacks[0].record))
        return self.loss_func(self.lin(self.emb(ids).mean(1)), y)

def texts(n=16, length=7):
    lengths,ids = torch.randint(2, length+1, (n,)),torch.randint(1, 30, (n,length))
    return ids.where(torch.arange(length)<lengths[:,None], 0),lengths,torch.randint(0, 4, (n,))

def fit_texts(module, mixing, *columns):
    pl.Trainer(max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[mixing]).fit(module, DataLoader(torch.utils.data.TensorDataset(*columns), batch_size=8))

def test_rows_of_texts_stay_beside_what_is_not_mixed():
    "Texts are sorted by length only where the whole batch is"
    ids,lengths,y = texts()
    module = Texts()
    fit_texts(module, Mixing(MixUp(.4), x=0, y=2), ids, lengths, y)
    for i,((beside,),record) in enumerate(module.seen):
        assert beside.tolist()==lengths[8*i:8*i+8].tolist() and record.plan.pairs[:,0].tolist()==list(range(8))
    module = Texts()
    fit_texts(module, Mixing(MixUp(.4)), ids, y)
    assert any(record.plan.pairs[:,0].tolist()!=list(range(8)) for _,record in module.seen)

def test_targets_changed_in_place_after_mixing():
    "Where the loss has a sorted copy of them, the partners' targets would not follow"
    ids,_,y = texts()
    with pytest.raises(RuntimeError, match='changed in place after it was mixed'): fit_texts(Texts(lambda y: y.clamp_(max=1)), Mixing(MixUp(.4)), ids, y)

class Last(nn.Module):
    def forward(self, o): return o[0]

def test_an_encoder_that_needs_sorted_texts():
    "fastai's reads each column of the batch up to its last row that is not padded"
    ids,lengths,y = texts()
    module = Texts()
    module.emb = nn.Sequential(SentenceEncoder(7, AWD_LSTM(30, 8, 8, 1, pad_token=0), pad_idx=0), Last())
    with pytest.raises(ValueError, match='SentenceEncoder needs texts in the order of their length'): fit_texts(module, Mixing(MixUp(.4), x=0, y=2), ids, lengths, y)
    fit_texts(module, Mixing(MixUp(.4)), ids, y)

def test_each_fit_tests_losses_anew():
    own,cb = nn.MSELoss(),Mixing(MixUp(.4))
    _own_loss._known[own] = {}
    cb.on_fit_start(SimpleNamespace(callbacks=[cb]), pl.LightningModule())
    assert own not in _own_loss._known
