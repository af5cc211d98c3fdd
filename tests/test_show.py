"Captions and pictures tell what the network is fed"
import re
import matplotlib.pyplot as plt, pandas as pd, pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.tabular.all import Categorify, TabularDataLoaders, tabular_learner
from fastai.tabular.all import Normalize as TabNormalize
from fastai.torch_core import set_seed
from fastai.vision.all import ImageBlock, Learner, MaskBlock, MultiCategoryBlock, PILMask, PointBlock, RegressionBlock
from fastmix.all import CutMix, ManifoldMixUp, MixUp, OneOf, digit_images, image_dls
from fastmix.show import mix_caption, mix_table

images,labels = digit_images()

@pytest.fixture(autouse=True)
def close():
    set_seed(0)
    yield
    plt.close('all')

@pytest.fixture(scope='module')
def dls(): return image_dls(images[:200], labels[:200], bs=16, num_workers=0)

def shown(): return [ax for ax in plt.gcf().axes if ax.images]

@pytest.mark.parametrize('mixer', [MixUp(1.), CutMix(1.), MixUp(1., per_batch=True)], ids=repr)
def test_captions_name_the_plan(mixer, dls, monkeypatch):
    "Each caption holds both labels with the shares of the very plan that mixed the picture"
    plans,draw,b = [], mixer.mix.draw, dls.one_batch()
    monkeypatch.setattr(mixer.mix, 'draw', lambda *args, **kwargs: plans.append(draw(*args, **kwargs)) or plans[-1])
    mixer.show_mix(dls, b, max_n=5)
    (plan,), axs = plans, shown()
    assert len(axs)==5
    for i,ax in enumerate(axs):
        lam = plan.lam.expand(16)[i].item()
        assert ax.get_title()==mix_caption([lam,1-lam], [dls.vocab[b[1][i]],dls.vocab[b[1][plan.idx[i]]]])
        want = 255*torch.Tensor(plan.mix(b[0])[i]).permute(1, 2, 0)
        torch.testing.assert_close(torch.as_tensor(ax.images[0].get_array()).float(), want, rtol=0, atol=1.)

def test_alpha_zero_shows_plain_labels(dls):
    MixUp(0).show_mix(dls, max_n=3)
    assert {ax.get_title() for ax in shown()} <= set(dls.vocab)

def test_masks():
    block = DataBlock((ImageBlock, MaskBlock), get_x=lambda i: images[i], get_y=lambda i: PILMask.create((images[i][...,0]>96).astype('uint8')))
    seg = block.dataloaders(range(40), bs=8, num_workers=0)
    MixUp(1.).show_mix(seg, max_n=4)
    assert all(len(ax.images)==3 and 'mask' in ax.get_title() for ax in shown())
    plt.close('all')
    CutMix(1.).show_mix(seg, max_n=4)
    assert all(len(ax.images)==2 and not ax.get_title() for ax in shown())

def test_several_labels_and_numbers():
    def show(block, get_y):
        plt.close('all')
        data = DataBlock((ImageBlock, block), get_x=lambda i: images[i], get_y=get_y).dataloaders(range(40), bs=8, num_workers=0)
        MixUp(1.).show_mix(data, max_n=4)
        return [ax.get_title().replace('\n', ' ') for ax in shown()]
    assert all(re.fullmatch(r'0\.\d\d \w( & \w)* \+ 0\.\d\d \w( & \w)*', o) for o in show(MultiCategoryBlock, lambda i: sorted(set(labels[i]))))
    for o in show(RegressionBlock, lambda i: float(i)):
        lam,y,lam1,y1,mixed = map(float, re.fullmatch(r'(.+)×(.+) \+ (.+)×(.+) = (.+)', o).groups())
        assert abs(lam*y + lam1*y1 - mixed) < .5

def test_a_learner_shows_its_own_mixer_and_rule(dls):
    def plain(p, y): return F.cross_entropy(p, y)
    learn = Learner(dls, nn.Identity(), plain, cbs=MixUp(1.))
    with pytest.warns(UserWarning, match='one λ'): learn.show_mix(max_n=5)
    assert len({ax.get_title()[:4] for ax in shown()})==1
    with pytest.raises(ValueError, match='no mixer'): Learner(dls, nn.Identity(), plain).show_mix()

def test_points():
    block = DataBlock((ImageBlock, PointBlock), get_x=lambda i: images[i], get_y=lambda i: [[1., 2.], [3., 4.]])
    pts = block.dataloaders(range(40), bs=8, num_workers=0)
    with pytest.raises(ValueError, match='MixUp'): CutMix().show_mix(pts)
    plt.close('all')
    MixUp(1.).show_mix(pts, max_n=2)
    assert [len(ax.collections) for ax in shown()]==[1,1] and not any(ax.get_title() for ax in shown())

def test_plot_lam_draws_each_part_of_a_combination():
    ax = OneOf(MixUp(.4), CutMix(1.)).plot_lam()
    assert [t.get_text() for t in ax.get_legend().get_texts()]==['α = 0.4', 'α = 1']

@pytest.mark.parametrize('layers', [None,'1'])
def test_pictures_are_shown_before_and_after_a_fit(layers):
    dls = image_dls(*digit_images(), bs=64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(dls.one_batch()[0][0].numel(), 9), nn.ReLU(), nn.Linear(9, 10))
    dls.show_mix(ManifoldMixUp(layers=layers))
    learn = Learner(dls, model, cbs=ManifoldMixUp(layers=layers))
    learn.show_mix()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.show_mix()
    plt.close('all')

def table_dls(y_names, y_block, **kwargs):
    df = pd.DataFrame(dict(city=['Bern','Rome','Oslo','Rome']*8, rooms=[1,2,3,4]*8, area=[50.,60.,70.,90.]*8, kind=['u','v','v','u']*8, price=[1.,2.,3.,4.]*8))
    set_seed(0)
    return TabularDataLoaders.from_df(df, procs=[Categorify,TabNormalize], cat_names=['city','rooms'], cont_names=['area'], y_names=y_names, y_block=y_block, bs=8, **kwargs)

@pytest.mark.parametrize('mixer', [MixUp(1.), MixUp(1., k=3), MixUp(0), MixUp(1., p=.5)], ids=['two','three','none','some'])
def test_tables(mixer, monkeypatch):
    "Numbers in their own units, blended; categories and targets with their shares, or alone where all are the same"
    dls = table_dls('kind', CategoryBlock())
    cat,cont,y = b = dls.one_batch()
    plan,_,xb,yb = mixer.draw(b[:2], b[2:])
    got = mix_table(dls, plan, xb, yb, max_n=6)
    city,rooms,mean,std = dls.train.classes['city'],dls.train.classes['rooms'],dls.train.means['area'],dls.train.stds['area']
    assert len(got)==6 and list(got)==['city','rooms','area','kind']
    for i,row in got.iterrows():
        js,ws = plan.pairs[i].tolist(),plan.shares.expand(plan.pairs.shape)[i].tolist()
        assert row.area==pytest.approx(sum(w*(cont[j,0].item()*std+mean) for w,j in zip(ws, js)), abs=1e-4)
        for name,of in dict(city=lambda j: city[cat[j,0]], rooms=lambda j: rooms[cat[j,1]], kind=lambda j: dls.vocab[y[j,0]]).items():
            values = [of(j) for j in js]
            assert row[name]==(values[0] if len(set(values))==1 else ' + '.join(f'{w:.2f} {v}' for w,v in zip(ws, values) if w))
    frames = []
    monkeypatch.setattr('fastmix.show.display_df', frames.append)
    dls.show_mix(mixer, max_n=2)
    assert len(frames[0])==2 and list(frames[0])==list(got)

def test_tables_of_numbers(monkeypatch):
    frames = []
    monkeypatch.setattr('fastmix.show.display_df', frames.append)
    tabular_learner(table_dls('price', RegressionBlock()), [4], cbs=MixUp(1.)).show_mix(max_n=8)
    for o in frames[0].price:
        if not isinstance(o, str): continue   # both cost the same
        lam,y,lam1,y1,mixed = map(float, re.fullmatch(r'(.+)×(.+) \+ (.+)×(.+) = (.+)', o).groups())
        assert abs(lam*y + lam1*y1 - mixed) < .05
    assert any(isinstance(o, str) for o in frames[0].price)

def test_who_has_no_mixer_is_told_what_may_be_wrong(dls):
    learn = Learner(dls, nn.Identity(), nn.CrossEntropyLoss(), cbs=FastaiMixUp(.4))
    with pytest.raises(ValueError, match='imported after fastai'): learn.show_mix()
    with pytest.raises(TypeError, match='mixer must be one of fastmix.* fastai.callback.mixup'): dls.show_mix(FastaiMixUp(.4))
    with pytest.raises(TypeError, match='see another one by dls.show_mix'): learn.show_mix(CutMix())
    plain = DataLoaders(*[torch.utils.data.DataLoader([(torch.rand(3), 1)])]*2)
    with pytest.raises(TypeError, match='needs loaders of fastai'): plain.show_mix(MixUp(.4))

def test_two_lines_of_caption_do_not_reach_the_picture_above():
    data = DataBlock((ImageBlock, RegressionBlock), get_x=lambda i: images[i], get_y=lambda i: float(i)).dataloaders(range(40), bs=8, num_workers=0)
    MixUp(1.).show_mix(data, max_n=6, nrows=2, figsize=(6,4))
    fig = plt.gcf()
    fig.canvas.draw()
    above,below = (shown()[i] for i in (0,3))
    assert '\n' in below.get_title() and below.title.get_window_extent().y1 <= above.get_window_extent().y0
