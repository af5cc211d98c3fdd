"Soft targets: what timm's and torchvision's mixup make of the same draws, and images that show the probabilities of their classes"
import copy, pickle
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from fastmix.losses import MixLoss
from fastmix.mixers import CutMix, CutMixUp, FMix, MixUp, OneOf
from fastmix.plan import Plan
from fastmix.regions import Mask
from fastmix.soft import SoftMix, soft_target

n = 8
x,y = torch.arange(float(n))[:,None,None,None].expand(n, 1, 16, 16).contiguous(),torch.arange(n)
def shown(classes, c=10): return F.one_hot(classes, c).float()[:,:,None,None].expand(-1, -1, 8, 8).contiguous()   # (bs, c, 8, 8): a channel is on, that of the class

def plan_of(xm, idx):
    "The plan that made `xm` of the constant images `x`"
    if xm[0].unique().numel()>1: return Plan.of(idx, region=Mask((xm[:1,0]==x[idx[0]].max()), (16,16)))
    return Plan.of(idx, ((xm[0]-x[idx[0]])/(x[0]-x[idx[0]])).mean()[None])

@pytest.mark.parametrize('smoothing', [0.,.1])
@pytest.mark.parametrize('kwargs', [dict(mixup_alpha=1., cutmix_alpha=0.), dict(mixup_alpha=0., cutmix_alpha=1.)], ids=['mixup','cutmix'])
def test_as_timm(kwargs, smoothing):
    from timm.data import Mixup
    torch.manual_seed(0)
    xm,want = Mixup(**kwargs, label_smoothing=smoothing, num_classes=10)(x.clone(), y)
    plan = plan_of(xm, y.flip(0))
    torch.testing.assert_close(plan.mix(x), xm)
    torch.testing.assert_close(soft_target(plan, y, 10, smoothing), want.float(), atol=1e-5, rtol=0)

@pytest.mark.parametrize('cls', [v2.MixUp,v2.CutMix])
def test_as_torchvision(cls):
    torch.manual_seed(1)
    xm,want = cls(alpha=1., num_classes=10)(x, y)
    plan = plan_of(xm, y.roll(1))
    torch.testing.assert_close(plan.mix(x), xm)
    torch.testing.assert_close(soft_target(plan, y, 10), want, atol=1e-5, rtol=0)

@pytest.mark.parametrize('mixer', [MixUp(1.), MixUp(1., k=3), MixUp(1., p=.5), CutMix(), FMix(), CutMixUp(1., 1.),
    OneOf(MixUp(1.), CutMix(), None, per_batch=False)], ids=repr)
@pytest.mark.parametrize('smoothing', [0.,.2])
def test_images_that_show_their_classes(mixer, smoothing):
    classes = torch.randint(10, (16,))
    xm,ym = SoftMix(mixer, 10, smoothing)(shown(classes), classes)
    torch.testing.assert_close(ym, xm.mean((2,3))*(1-smoothing) + smoothing/10)

def test_the_loss_is_the_mixed_one():
    plan,pred,classes = Plan.of(torch.randperm(12), torch.rand(12)),torch.randn(12, 5),torch.randint(5, (12,))
    want = MixLoss(nn.CrossEntropyLoss(label_smoothing=.3))(pred, classes, plan=plan)
    torch.testing.assert_close(F.cross_entropy(pred, soft_target(plan, classes, 5, .3)), want)

def test_masks_are_cut_or_made_one_hot():
    masks = torch.randint(3, (n,16,16))
    xm,cut = SoftMix(CutMix(), 3)(masks[:,None].float(), masks)
    assert not cut.is_floating_point() and xm[:,0].equal(cut.float())
    images = F.one_hot(masks, 3).movedim(3, 1).float()
    for mix in SoftMix(MixUp(1.), 3),SoftMix(CutMix(), 3, .3):
        xm,soft = mix(images, masks)
        torch.testing.assert_close(soft, xm*(1-mix.label_smoothing) + mix.label_smoothing/3)

def test_probabilities_are_mixed_again():
    first = SoftMix(MixUp(1.), 10)(shown(y), y)
    xm,ym = SoftMix(CutMix(), 10)(*first)
    torch.testing.assert_close(ym, xm.mean((2,3)))

@pytest.mark.parametrize('off', [lambda mix: setattr(mix, 'enabled', False), lambda mix: setattr(mix, 'mixup_enabled', False), lambda mix: mix.eval()], ids=['enabled','as in timm','eval'])
def test_switched_off(off):
    mix = SoftMix(MixUp(1.), 10, .1)
    off(mix)
    xm,ym = mix(x, y)
    assert xm is x and ym.allclose(F.one_hot(y, 10)*.9 + .01)

def test_batches_of_any_shape():
    images = shown(y)
    for mix,batch,at in [
        (SoftMix(MixUp(1.), 10), (images,y), lambda b: (b[0],b[1])),
        (SoftMix(MixUp(1.), 10), [images,y], lambda b: (b[0],b[1])),
        (SoftMix(MixUp(1.), 10), dict(img=images, label=y), lambda b: (b['img'],b['label'])),
        (SoftMix(MixUp(1.), 10, x=('views',0), y=('meta','cls')), dict(views=[images,'left'], meta=dict(cls=y)), lambda b: (b['views'][0],b['meta']['cls']))]:
        was = copy.deepcopy(batch)
        res = mix(batch)
        xm,ym = at(res)
        torch.testing.assert_close(ym, xm.mean((2,3)))
        assert type(res) is type(batch) and at(batch)[0].equal(at(was)[0]) and at(batch)[1].equal(y)

def test_in_a_loader_and_behind_a_transform():
    items = [*zip(shown(torch.arange(64) % 10), torch.arange(64) % 10)]
    for collate,workers in (SoftMix(CutMixUp(1., 1.), 10),2),(v2.Compose([SoftMix(MixUp(1.), 10)]),0):
        seen = [*DataLoader(items, 16, collate_fn=collate, num_workers=workers)]
        for xm,ym in seen: torch.testing.assert_close(ym, xm.mean((2,3)))
        assert len({ym.max(1).values.sum().item() for _,ym in seen})==len(seen)

def test_pickled_and_printed():
    mix = pickle.loads(pickle.dumps(SoftMix(MixUp(.4), 10, .1)))
    assert repr(mix)=='SoftMix(MixUp(0.4), num_classes=10, label_smoothing=0.1)' and mix(x, y)[1].shape==(n,10)

@pytest.mark.parametrize(('make','call','match'), [
    (lambda: SoftMix(v2.MixUp(num_classes=10), 10), None, 'SoftMix\\(MixUp\\(.4\\), num_classes=10\\)'),
    (lambda: SoftMix(MixUp(.4), 0), None, 'num_classes must be an integer of at least 1'),
    (lambda: SoftMix(MixUp(.4), 10, 1.5), None, 'label_smoothing must be a number'),
    (lambda: SoftMix(MixUp(lambda pct: .4), 10), None, 'follows a schedule'),
    (lambda: SoftMix(MixUp(.4), 7), (x,y), 'num_classes=7, but the targets go from 0 to 7'),
    (lambda: SoftMix(MixUp(.4), 10), (x,y-1), 'go from -1 to 6'),
    (lambda: SoftMix(MixUp(.4), 10), (x,torch.rand(n, 9)), 'num_classes=10, but the target is torch.float32 of shape \\(8, 9\\)'),
    (lambda: SoftMix(MixUp(.4), 10), (x,torch.rand(n)), 'Numbers have no classes'),
    (lambda: SoftMix(MixUp(.4), 10), (x,torch.zeros(n, 10).long()), 'or probabilities as floats'),
    (lambda: SoftMix(MixUp(.4), 10), (x,y,y+1), 'pass the positions of both'),
    (lambda: SoftMix(MixUp(.4), 10, x=0, y=[1,2]), (x,y,y+1), 'one target')])
def test_errors(make, call, match):
    with pytest.raises((ValueError,TypeError), match=match): make()(*call)

class Spied(nn.Module):
    "A linear model of images that show their classes, which keeps its inputs"
    def __init__(self):
        super().__init__()
        self.seen,self.lin = [],nn.Linear(10, 10)
    def forward(self, x):
        self.seen.append(x)
        return self.lin(x.mean((2,3)))

class SpiedLoss(nn.CrossEntropyLoss):
    "Cross-entropy, which keeps its targets and its values"
    seen = []
    def forward(self, pred, target):
        loss = super().forward(pred, target)
        self.seen.append((pred.detach(),target,loss.item()))
        return loss

def check_seen(xs, calls):
    "Training targets are the probabilities that the inputs show, and the loss is theirs by the formula; validation targets are classes. How many of each?"
    mixed = [o for o in zip(xs, calls) if o[1][1].is_floating_point()]
    for x,(pred,target,loss) in mixed:
        torch.testing.assert_close(target, x.mean((2,3)))
        assert loss==pytest.approx(-(x.mean((2,3))*pred.log_softmax(1)).sum(1).mean().item(), abs=1e-5)
    assert any(target.max(1).values.min()<.99 for _,(_,target,_) in mixed)
    assert all(x.equal(shown(target)) for x,(_,target,_) in zip(xs, calls) if not target.is_floating_point())
    return len(mixed),len(calls)-len(mixed)

def test_skorch(monkeypatch):
    from skorch import NeuralNetClassifier
    monkeypatch.setattr(SpiedLoss, 'seen', [])
    torch.manual_seed(0)
    classes = torch.arange(50)%10
    net = NeuralNetClassifier(Spied, criterion=SpiedLoss, max_epochs=2, batch_size=8, iterator_train__collate_fn=SoftMix(MixUp(1.), 10), verbose=0)
    net.fit(shown(classes).numpy(), classes.numpy())
    assert check_seen(net.module_.seen, SpiedLoss.seen)==(10,4)   # two epochs of 40 images and 10
    assert net.predict(shown(classes).numpy()).shape==(50,)

def test_ignite(monkeypatch):
    from ignite.engine import create_supervised_trainer
    monkeypatch.setattr(SpiedLoss, 'seen', [])
    torch.manual_seed(0)
    model,classes = Spied(),torch.arange(48)%10
    ds = [*zip(shown(classes), classes.tolist())]
    trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), .1), SpiedLoss())
    trainer.run(DataLoader(ds, 8, collate_fn=SoftMix(MixUp(1.), 10)), max_epochs=2)
    assert check_seen(model.seen, SpiedLoss.seen)==(12,0)
