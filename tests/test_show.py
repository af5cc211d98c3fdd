"Captions and images show what the model is called with"
import re
from importlib import import_module
import matplotlib.pyplot as plt, pandas as pd, pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.tabular.all import Categorify, TabularDataLoaders, tabular_learner
from fastai.tabular.all import Normalize as TabNormalize
from fastai.torch_core import set_seed
from fastai.vision.all import ImageBlock, Learner, MaskBlock, MultiCategoryBlock, PILMask, PointBlock, RegressionBlock
from fastmix.data import digit_images, image_dls
from fastmix.mixers import CutMix, MixUp, OneOf, SaliencyMix
from fastmix.regions import spectral_residual
from fastmix.show import decode_mix, mix_caption
from helpers import name_of, quiet_fit

images,labels = digit_images()

@pytest.fixture(autouse=True)
def close():
    set_seed(0)
    yield
    plt.close('all')

@pytest.fixture(scope='module')
def dls(): return image_dls(images[:200], labels[:200], bs=16, num_workers=0)

def digit_dls(block, get_y): return DataBlock((ImageBlock, block), get_x=lambda i: images[i], get_y=get_y).dataloaders(range(40), bs=8, num_workers=0)
def shown(): return [ax for ax in plt.gcf().axes if ax.images]
def titles(): return [ax.get_title().replace('\n', ' ') for ax in shown()]

def spy(mixer, monkeypatch):
    "The plans that `mixer` draws"
    plans,draw = [],mixer.draw
    monkeypatch.setattr(mixer, 'draw', lambda *args, **kwargs: plans.append(draw(*args, **kwargs)) or plans[-1])
    return plans

@pytest.mark.parametrize('mixer', [MixUp(1.), MixUp(1., k=3), CutMix(per_batch=True), OneOf(MixUp(1.), CutMix(), None, per_batch=False)], ids=name_of)
def test_captions_name_the_plan(mixer, dls, monkeypatch):
    "Each caption holds the labels and weights of the very plan that mixed the image; what was pasted has an outline"
    plans,b = spy(mixer, monkeypatch),dls.one_batch()
    mixer.show_mix(dls, b, max_n=5)
    (plan,),axs = plans,shown()
    assert len(axs)==5
    mixed,weights = plan.mix(b[0]),plan.weights.expand(plan.pairs.shape).tolist()
    for i,ax in enumerate(axs):
        want = [f'{w:.2f} {dls.vocab[b[1][j]]}' for w,j in zip(weights[i], plan.pairs[i]) if w]
        assert titles()[i]==' + '.join(want)
        torch.testing.assert_close(torch.as_tensor(ax.images[0].get_array()).float(), 255*torch.Tensor(mixed[i]).permute(1, 2, 0), rtol=0, atol=1.)
        mask = plan.region.mask.expand(16, 32, 32)[i] if plan.region else torch.zeros(1, dtype=bool)
        assert len(ax.collections)==(mask.any() and not mask.all())

def test_alpha_zero_shows_plain_labels(dls):
    MixUp(0).show_mix(dls, max_n=3)
    assert set(titles()) <= set(dls.vocab)

def test_saliency_is_that_of_the_partner(dls, monkeypatch):
    "A veil over all but the most salient place"
    plans,b = spy(mixer := SaliencyMix(), monkeypatch),dls.one_batch()
    mixer.show_mix(dls, b, max_n=4, saliency=spectral_residual)
    found = spectral_residual(b[0])
    for i,ax in enumerate(shown()):
        veil = torch.as_tensor(ax.images[1].get_alpha())
        assert veil.argmin()==found[plans[0].idx[i]].argmax() and veil.min()==0 and veil.max()<=.8

def test_masks():
    "Blended ones are both laid over the image, cut ones are cut"
    seg = digit_dls(MaskBlock, lambda i: PILMask.create((images[i][...,0]>96).astype('uint8')))
    MixUp(1.).show_mix(seg, max_n=4)
    for ax in shown():
        own,partner = (o.get_alpha() for o in ax.images[1:])
        assert own+partner==pytest.approx(.7) and ax.get_title().startswith(f'{own/.7:.2f} own mask')
    plt.close('all')
    CutMix(1.).show_mix(seg, max_n=4)
    assert all(len(ax.images)==2 and not ax.get_title() for ax in shown())

def test_several_labels_and_numbers():
    MixUp(1.).show_mix(digit_dls(MultiCategoryBlock, lambda i: sorted(set(labels[i]))), max_n=4)
    assert all(re.fullmatch(r'[01]\.\d\d \w( & \w)* \+ [01]\.\d\d \w( & \w)*', o) for o in titles())
    plt.close('all')
    MixUp(1.).show_mix(digit_dls(RegressionBlock, lambda i: float(i)), max_n=4)
    for o in titles():
        lam,y,lam1,y1,mixed = map(float, re.fullmatch(r'(.+)×(.+) \+ (.+)×(.+) = (.+)', o).groups())
        assert abs(lam*y + lam1*y1 - mixed) < .5
    plt.close('all')
    MixUp(1.).show_mix(digit_dls(RegressionBlock, lambda i: [i/2,2.,3.]), max_n=4)
    assert all(re.fullmatch(r'[01]\.\d\d [\d.]+ & 2 & 3 \+ [01]\.\d\d [\d.]+ & 2 & 3', o) for o in titles())

def test_points_are_blended(monkeypatch):
    pts = digit_dls(PointBlock, lambda i: [[i/10, 2.], [3., 4.]])
    with pytest.raises(ValueError, match='MixUp'): CutMix().show_mix(pts)
    plt.close('all')
    plans,b = spy(mixer := MixUp(1.), monkeypatch),pts.one_batch()
    mixer.show_mix(pts, b, max_n=2)
    for i,ax in enumerate(shown()):
        want = sum(w*(torch.Tensor(b[1])[j]+1)*4 for w,j in zip(plans[0].weights[i], plans[0].pairs[i]))   # pixels of 8x8 images
        torch.testing.assert_close(torch.tensor(ax.collections[0].get_offsets()).float(), want)
        assert not ax.get_title()

def test_targets_are_decoded_from_plain_tensors():
    "As they are in a learner, where fastai has removed their types"
    dls = digit_dls(MaskBlock, lambda i: PILMask.create((images[i][...,0]>96).astype('uint8')))
    x,y = (o.as_subclass(torch.Tensor) for o in dls.one_batch())
    plan = MixUp(1.).draw(x)
    items,targets,blended = decode_mix(dls, plan, (plan.mix(x),), (y,), max_n=3)
    assert blended==[True] and len(items)==3
    for i,((own,partner),) in enumerate(targets):
        assert own.as_subclass(torch.Tensor).equal(y[i]) and partner.as_subclass(torch.Tensor).equal(y[plan.idx[i]])
        assert 'mask' in mix_caption([.7,.3], [own,partner])

def test_a_learner_shows_its_own_mixer_and_rule(dls):
    def plain(p, y): return F.cross_entropy(p, y)
    learn = Learner(dls, nn.Identity(), plain, cbs=MixUp(1.))
    with pytest.warns(UserWarning, match='one λ'): learn.show_mix(max_n=5)
    assert len({o[:4] for o in titles()})==1

@pytest.mark.parametrize('module,name', [('mixers','MixUp'),('manifold','ManifoldMixUp')])
def test_before_and_after_a_fit(module, name):
    mixer = getattr(import_module(f'fastmix.{module}'), name)
    data = image_dls(images[:128], labels[:128], bs=16, size=8)
    data.show_mix(mixer(), max_n=2)
    learn = Learner(data, nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, 10)), cbs=mixer())
    for _ in range(2):
        learn.show_mix(max_n=2)
        assert learn.loss_func is quiet_fit(learn).loss_func
    assert len(shown())==2

def test_two_lines_of_caption_do_not_reach_the_image_above():
    MixUp(1.).show_mix(digit_dls(RegressionBlock, lambda i: float(i)), max_n=6, nrows=2, figsize=(6,4))
    fig = plt.gcf()
    fig.canvas.draw()
    above,below = (shown()[i] for i in (0,3))
    assert '\n' in below.get_title() and below.title.get_window_extent().y1 <= above.get_window_extent().y0

def test_without_a_mixer_of_fastmix_the_error_says_what_may_be_wrong(dls):
    learn = Learner(dls, nn.Identity(), nn.CrossEntropyLoss(), cbs=FastaiMixUp(.4))
    with pytest.raises(ValueError, match='no mixer.*imported after fastai'): learn.show_mix()
    with pytest.raises(TypeError, match='mixer must be one of fastmix.* fastai.callback.mixup'): dls.show_mix(FastaiMixUp(.4))
    with pytest.raises(TypeError, match=r'to see another one, write dls.show_mix\(CutMix\(1.0\)\)'): learn.show_mix(CutMix())
    plain = DataLoaders(*[torch.utils.data.DataLoader([(torch.rand(3), 1)])]*2)
    with pytest.raises(TypeError, match='needs loaders of fastai'): plain.show_mix(MixUp(.4))

# Tables

@pytest.fixture
def frames(monkeypatch):
    "The tables that are displayed"
    res = []
    monkeypatch.setattr('fastmix.show.display_df', res.append)
    return res

def table_dls(y_names, y_block, **kwargs):
    df = pd.DataFrame(dict(city=['Bern','Rome','Oslo','Rome']*8, rooms=[1,2,3,4]*8, area=[50.,60.,70.,90.]*8, kind=['u','v','v','u']*8, price=[1.,2.,3.,4.]*8))
    set_seed(0)
    return TabularDataLoaders.from_df(df, procs=[Categorify,TabNormalize], cat_names=['city','rooms'], cont_names=['area'], y_names=y_names, y_block=y_block, bs=8, **kwargs)

@pytest.mark.parametrize('mixer', [MixUp(1., k=3), MixUp(0), MixUp(1., p=.5)], ids=['three','none','some'])
def test_tables(mixer, frames, monkeypatch):
    "Numbers in their own units, blended; categories and targets with their weights, or alone where all are the same"
    dls = table_dls('kind', CategoryBlock())
    plans,(cat,cont,y) = spy(mixer, monkeypatch),dls.one_batch()
    dls.show_mix(mixer, b=(cat,cont,y), max_n=6)
    (plan,),(got,) = plans,frames
    city,rooms,mean,std = dls.train.classes['city'],dls.train.classes['rooms'],dls.train.means['area'],dls.train.stds['area']
    assert len(got)==6 and list(got)==['city','rooms','area','kind']
    for i,row in got.iterrows():
        js,ws = plan.pairs[i].tolist(),plan.weights.expand(plan.pairs.shape)[i].tolist()
        assert row.area==pytest.approx(sum(w*(cont[j,0].item()*std+mean) for w,j in zip(ws, js)), abs=1e-4)
        for name,of in dict(city=lambda j: city[cat[j,0]], rooms=lambda j: rooms[cat[j,1]], kind=lambda j: dls.vocab[y[j,0]]).items():
            values = [of(j) for j in js]
            assert row[name]==(values[0] if len(set(values))==1 else ' + '.join(f'{w:.2f} {v}' for w,v in zip(ws, values) if w))

def test_tables_of_numbers(frames):
    tabular_learner(table_dls('price', RegressionBlock()), [4], cbs=MixUp(1.)).show_mix(max_n=8)
    for o in frames[0].price:
        if not isinstance(o, str): continue   # both cost the same
        lam,y,lam1,y1,mixed = map(float, re.fullmatch(r'(.+)×(.+) \+ (.+)×(.+) = (.+)', o).groups())
        assert abs(lam*y + lam1*y1 - mixed) < .05
    assert any(isinstance(o, str) for o in frames[0].price)

# λ

def test_plot_lam():
    "Each part of a combination, a histogram for more than two, and a schedule from where it begins"
    ax = OneOf(MixUp(.4), CutMix(1.), None, OneOf(MixUp(.3, k=3))).plot_lam()
    assert [t.get_text() for t in ax.get_legend().get_texts()]==['α = 0.4', 'α = 1', 'α = 0.3, k = 3']
    heights = torch.tensor([o.get_height() for o in ax.patches])
    assert heights.mean()==pytest.approx(1, abs=.01) and not heights[:33].any()   # the largest of three weights is above a third
    line, = MixUp(lambda pct: 1-pct/2, fold=False).plot_lam().lines
    assert (line.get_ydata()==1).all()   # Beta(1,1) is uniform

def test_a_schedule_is_shown_where_it_is_asked_for(dls):
    "By default at its beginning"
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 10)), cbs=MixUp(1., until=.5))
    quiet_fit(learn)
    learn.show_mix()
    assert all('+' in o for o in titles())
    learn.show_mix(pct=.7)
    assert not any('+' in o for o in titles())

def test_what_else_has_a_plot_of_lam(dls):
    learn = Learner(dls, nn.Flatten(), cbs=MixUp(.4))
    want,got = MixUp(.4).plot_lam(),learn.plot_lam()
    assert got.lines[0].get_ydata()==pytest.approx(want.lines[0].get_ydata())
    with pytest.raises(TypeError, match=r'write learn.show_mix\(\).*dls.show_mix\(MixUp\(0.4\)\)'): MixUp(.4).show_mix(learn)
