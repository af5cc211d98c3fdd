"`LogMix`: event files and W&B runs are read back, and compared with the batches that a recorder saw"
import csv, pickle
from io import BytesIO
import numpy as np, pandas as pd, pytest, torch, wandb
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.schedule import SchedLin
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.all import Categorify, TabularDataLoaders, tabular_learner
from fastai.tabular.all import Normalize as TabNormalize
from fastai.torch_core import set_seed
from fastai.vision.all import CategoryBlock, Normalize, imagenet_stats
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from fastmix.data import digit_images, image_dls
from fastmix.log import LogMix, mix_grids, mix_report
from fastmix.mixers import CutMix, MixUp, OneOf
from fastmix.partners import SecondLoader
from helpers import class_dls, mk_dls, mk_learn, name_of, quiet_fit, Record

@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def read(log_dir): return EventAccumulator(str(log_dir), dict.fromkeys(['images','histograms','scalars','tensors'], 0)).Reload()
def image(event): return np.asarray(Image.open(BytesIO(event.encoded_image_string))).astype(float)/255
def text(log): return [o.tensor_proto.string_val[0].decode() for o in log.Tensors('mix/targets/text_summary')]
def tiles(grid, n, side): return [grid[2+(side+2)*r:, 2+(side+2)*c:][:side,:side] for r in range(n) for c in range(n)]

def image_learn(*cbs, c=3, side=8, n=20):
    g = torch.Generator().manual_seed(1)
    x,y = torch.rand(n, c, side, side, generator=g),torch.randint(0, 4, (n,), generator=g)
    return mk_learn(mk_dls([x], [y], bs=10), nn.Sequential(nn.Flatten(), nn.Linear(c*side*side, 4)), cbs=list(cbs))

def digit_learn(*cbs, tfm=None, n=80):
    set_seed(0)
    dls = image_dls(*(o[:n] for o in digit_images()), bs=16)
    for dl in dls: dl.after_batch.add(tfm) if tfm else None
    return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 10)), loss_func=CrossEntropyLossFlat(), cbs=list(cbs))

# Images
@pytest.mark.parametrize('mixer', [MixUp(.4), CutMix(per_batch=True), MixUp(.4, k=3)], ids=name_of)
def test_images_of_what_the_model_saw(tmp_path, mixer):
    rec = Record()
    quiet_fit(image_learn(mixer, rec, LogMix(log_dir=tmp_path)), 2)
    log = read(tmp_path)
    grids = {name: log.Images(f'mix/{name}') for name in ['mixed','original','difference']}
    assert all([o.step for o in g]==[1,3] for g in grids.values())
    for epoch in 0,1:
        b = rec.batches[2*epoch]
        mixed,x0 = [o[:9].permute(0,2,3,1).numpy() for o in (b['mixed'][0],b['xb0'][0])]
        low,high = min(mixed.min(), x0.min()),max(mixed.max(), x0.max())
        for name,want in dict(mixed=(mixed-low)/(high-low), original=(x0-low)/(high-low), difference=abs(mixed-x0)/(high-low)).items():
            for tile,o in zip(tiles(image(grids[name][epoch]), 3, 8), want, strict=True): assert abs(tile-o).max() < 1/255

def test_a_normalisation_is_undone(tmp_path):
    rec = Record()
    quiet_fit(digit_learn(MixUp(.4), rec, LogMix(log_dir=tmp_path), tfm=Normalize.from_stats(*imagenet_stats, cuda=False)))
    mean,std = [np.array(o) for o in imagenet_stats]
    x0 = rec.batches[0]['xb0'][0][:9].permute(0,2,3,1).numpy()*std + mean
    found = tiles(image(read(tmp_path).Images('mix/original')[0]), 3, 32)
    assert abs(np.stack(found) - (x0-x0.min())/(x0.max()-x0.min())).max() < .02

def test_any_number_of_channels():
    "Other numbers than one or three are averaged; a flat image causes no division by zero"
    for c in 1,2,3,5:
        x = torch.rand(2, c, 4, 4)
        grids = mix_grids(x, x)
        shown = x if c in (1,3) else x.mean(1, keepdim=True)
        want = ((shown-shown.min())/(shown.max()-shown.min()))[0].expand(3, 4, 4)
        assert torch.allclose(grids['mixed'][:,2:6,2:6], want, atol=1e-6)
    assert all(o.isfinite().all() for o in mix_grids(torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4)).values())

def test_several_images_in_a_nest():
    x,y = torch.rand(20, 3, 8, 8),torch.arange(20)%4
    report = mix_report(MixUp(.4).mix_batch(((x,[1-x]),), (y,), nn.CrossEntropyLoss()))
    assert [*report.grids]==[f'{o}{n}' for n in ['','_1'] for o in ['mixed','original','difference']]
    assert torch.allclose(report.grids['difference'], report.grids['difference_1'], atol=1e-5)

# Targets
def test_labels_and_weights_in_words(tmp_path):
    learn = digit_learn(MixUp(.4), rec := Record(), LogMix(max_n=4, log_dir=tmp_path))
    quiet_fit(learn)
    vocab,(y,),plan = learn.dls.vocab,rec.batches[0]['yb'],rec.batches[0]['plan']
    rows = [f'| {i+1} | {lam:.2f} {vocab[y[i]]} + {1-lam:.2f} {vocab[y[j]]} |' for i,(lam,j) in enumerate(zip(plan.lam[:4].tolist(), plan.idx[:4].tolist())) if lam<1]
    assert rows and all(row in text(read(tmp_path))[0] for row in rows)

def test_targets_from_a_second_loader(tmp_path):
    g = torch.Generator().manual_seed(2)
    second = mk_dls([torch.rand(20, 3, 8, 8, generator=g)], [torch.full((20,), 3)], bs=10).train
    quiet_fit(image_learn(MixUp(1., partners=SecondLoader(second)), LogMix(log_dir=tmp_path)))
    rows = text(read(tmp_path))[0].splitlines()[2:]
    assert len(rows)==9 and all(row.endswith(' 3 |') for row in rows)

@pytest.mark.parametrize('mixer', [MixUp(0),OneOf(None)], ids=name_of)
def test_an_unmixed_batch_has_single_labels(tmp_path, mixer):
    learn = digit_learn(mixer, rec := Record(), LogMix(max_n=4, log_dir=tmp_path))
    quiet_fit(learn)
    log,(y,) = read(tmp_path),rec.batches[0]['yb']
    assert text(log)[0].splitlines()[2:] == [f'| {i+1} | 1.00 {learn.dls.vocab[y[i]]} |' for i in range(4)]
    assert sum(o.histogram_value.num for o in log.Histograms('mix/lam'))==16*len(rec.batches)

def test_tables(tmp_path):
    "No images, but targets by name; the last batch may be shorter than what is shown"
    g = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=g.choice(list('xyz'), 64), b=g.normal(size=64), y=g.choice(['no','yes'], 64)))
    kinds = dict(cat_names=['a'], cont_names=['b'], y_names='y', y_block=CategoryBlock())
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,TabNormalize], bs=8, num_workers=0, **kinds)
    quiet_fit(tabular_learner(dls, layers=[8], cbs=[MixUp(1.), LogMix(log_dir=tmp_path)]))
    log = read(tmp_path)
    rows = text(log)[0].splitlines()
    assert not log.Tags()['images'] and rows[0].startswith('| sample |') and len(rows)==2+8 and all('yes' in o or 'no' in o for o in rows[2:])

# When
def test_every_n_batches(tmp_path):
    quiet_fit(image_learn(MixUp(.4), LogMix(every=3, log_dir=tmp_path), n=50), 2)
    assert [o.step for o in read(tmp_path).Images('mix/mixed')] == [3,6,9]

def test_lam_of_an_epoch_and_schedules(tmp_path):
    rec = Record()
    quiet_fit(image_learn(MixUp(SchedLin(.1, 1.)), rec, LogMix(log_dir=tmp_path)), 2)
    log = read(tmp_path)
    for i,o in enumerate(log.Histograms('mix/lam')):
        lam = torch.cat([b['plan'].lam for b in rec.batches[2*i:2*i+2]]).double()
        h = o.histogram_value
        assert (h.num,h.min,h.max) == (20,lam.min(),lam.max()) and h.sum==pytest.approx(lam.sum().item())
    assert len(log.Histograms('mix/lam'))==2
    assert [(o.step,o.value) for o in log.Scalars('mix/alpha')]==[(i+1,pytest.approx(.1+.9*i/4)) for i in range(4)]

def test_only_in_training(tmp_path):
    learn = image_learn(MixUp(.4), LogMix(), n=100)
    learn.get_preds()
    learn.validate()
    with learn.no_bar(): learn.lr_find(show_plot=False, num_it=20)
    assert not (tmp_path/'runs').exists()

def test_nothing_ends_a_training(tmp_path):
    "A label that has no name, a callback that writes something else, a batch that is left out before it was mixed"
    class Other(Callback):
        order,run_valid = -2,False
        def before_fit(self): self.writer = csv.writer(open(tmp_path/'x.csv', 'w'))
        def before_batch(self):
            if not self.train_iter: raise CancelBatchException
            self.y[:4] = -100
    quiet_fit(digit_learn(MixUp(.4), Other(), LogMix(every=2, log_dir=tmp_path/'log')))
    log = read(tmp_path/'log')
    assert [o.step for o in log.Images('mix/mixed')]==[2] and '-100' in text(log)[0]

def test_after_an_interruption(tmp_path):
    class Stop(Record):
        def after_batch(self): raise KeyboardInterrupt
    learn = image_learn(MixUp(.4), LogMix(log_dir=tmp_path))
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn, cbs=Stop())
    quiet_fit(learn)
    pickle.dumps(learn)

# Where
def test_no_second_writer_beside_fastais(tmp_path):
    quiet_fit(image_learn(MixUp(.4), TensorBoardCallback(tmp_path/'theirs', trace_model=False, log_preds=False), LogMix()))
    tags = read(tmp_path/'theirs').Tags()
    assert 'train_loss' in tags['scalars'] and 'mix/mixed' in tags['images'] and not (tmp_path/'runs').exists()

def test_wandb_offline(tmp_path, monkeypatch):
    from fastai.callback.wandb import WandbCallback
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.setattr('fastai.callback.wandb._format_config', dict)   # with fastcore 2.2.39 it fails for any number among the arguments
    logged = []
    with wandb.init(mode='offline', project='test', dir=tmp_path, settings=wandb.Settings(console='off')) as run:
        own_log = run.log
        monkeypatch.setattr(run, 'log', lambda data, *args, **kwargs: (logged.append((data,kwargs.get('step'))), own_log(data, *args, **kwargs))[1])
        rec = Record()
        quiet_fit(digit_learn(MixUp(SchedLin(.1, 1.)), rec, WandbCallback(log=None, log_preds=False), LogMix(), n=64), 2)
        files = sorted((tmp_path/'wandb').glob('offline-run*/files/media/images/mix/mixed*.png'))
    assert len(files)==2 and not (tmp_path/'runs').exists()
    grid = mix_grids(rec.batches[0]['xb0'][0][:9], rec.batches[0]['mixed'][0][:9])['mixed'].permute(1,2,0).numpy()
    assert min(abs(np.asarray(Image.open(f).convert('RGB'))/255 - grid).max() for f in files) <= 1/255
    assert [step for data,step in logged if 'mix/mixed' in data] == [0,2]
    assert [step for data,step in logged if 'mix/lam' in data] == [1,3]
    assert len([1 for data,_ in logged if 'mix/alpha' in data]) == 4

# Errors
def test_what_is_wrong():
    with pytest.raises(ValueError, match='no mixer of fastmix: add one, as in'): quiet_fit(mk_learn(class_dls(), cbs=LogMix()))
    for every in 0,1.5,'epoch':
        with pytest.raises(ValueError, match=f'every, .* must be an integer.*it is {every!r}'): LogMix(every)
