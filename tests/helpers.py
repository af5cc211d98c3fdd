"Small learners, and a callback that records what a fit was fed"
import faulthandler, os, re, socket, subprocess, sys, time
from pathlib import Path
import torch
from torch import nn
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, Datasets
from fastai.learner import Learner
from fastai.torch_core import set_seed

class Record(Callback):
    "Per training batch: the batch before mixing, what the model was given and gave, the plan and the loss"
    order,run_valid = -1,False
    def before_fit(self): self.batches = []
    def before_batch(self): self.batches.append(dict(xb=self.learn.xb, yb=self.learn.yb, xb0=[x.clone() for x in self.learn.xb]))
    def after_loss(self): self.batches[-1].update(mixed=self.learn.xb, pred=self.learn.pred, loss=self.learn.loss.detach(), plan=self.plan())
    def plan(self): return next((cb.record.plan for cb in self.learn.cbs if hasattr(type(cb), 'mix_batch') and cb.record), None)

def name_of(o):
    "As an id of a test: without a memory address, so that all processes collect the same tests"
    return re.sub(' at 0x[0-9a-f]+', '', str(o))

class Items(list): "Tuples of tensors, of which the first `n_inp` are inputs"

def mk_dls(xs, ys, bs=8, n_inp=1, **kwargs):
    "Loaders over tuples of tensors: the same items for training and validation"
    set_seed(0)      # fastai's loaders take the seed of their shuffling when they are made
    items = Items(zip(*xs, *ys))
    items.n_inp = n_inp
    return DataLoaders.from_dsets(items, items, bs=bs, device='cpu', num_workers=0, **kwargs)

def class_dls(n=32, n_in=6, c=4, bs=8, seed=0, **kwargs):
    g = torch.Generator().manual_seed(seed)
    return mk_dls([torch.randn(n, n_in, generator=g)], [torch.randint(0, c, (n,), generator=g)], bs=bs, **kwargs)

def mk_learn(dls, model=None, loss_func=None, **kwargs):
    set_seed(0)
    learn = Learner(dls, model or nn.Linear(6, 4), loss_func=nn.CrossEntropyLoss() if loss_func is None else loss_func, **kwargs)
    # fastai's progress bar, there once anybody has imported it, breaks by itself when a fit is cancelled before it has begun
    return learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])

def quiet_fit(learn, n_epoch=1, **kwargs):
    with learn.no_logging(): learn.fit(n_epoch, **kwargs)
    return learn

def vector(i): return torch.full((6,), i/32).sin()
def parity(i): return torch.tensor(i%4)
def exportable_dls(): return Datasets(list(range(32)), [[vector],[parity]], splits=(range(32),range(32))).dataloaders(bs=8, num_workers=0, device='cpu')

def run_ranks(script, out):
    "Run `script` in two processes that talk to each other, and return what each rank saved by `save_rank` in the folder `out`"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = os.environ | dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', GLOO_SOCKET_IFNAME='lo')
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    ps = [subprocess.Popen([sys.executable, script, str(out)], env=env | dict(RANK=r, LOCAL_RANK=r), **pipes) for r in '01']
    try:
        logs = [p.communicate()[0] for p in ps]
        assert not any(p.returncode for p in ps), '\n'.join(logs)
    finally:
        for p in ps: p.kill()
    return [torch.load(out/f'{r}.pth') for r in range(2)]

def begin_rank():
    "The folder to save to, and the rank. A rank that hangs says where, and ends"
    faulthandler.dump_traceback_later(180, exit=True)
    return Path(sys.argv[1]),int(os.environ['RANK'])

def save_rank(res, out, rank):
    "Save `res`, and end at once when both have: once, a rank was seen to abort while the interpreter ended, with all its work done"
    torch.save(res, out/f'{rank}.tmp')
    (out/f'{rank}.tmp').rename(out/f'{rank}.pth')
    while not all((out/f'{r}.pth').exists() for r in range(2)): time.sleep(.1)
    os._exit(0)
