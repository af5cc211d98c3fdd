"The experiments behind the evidence: runs that resume, hyper-parameters that are chosen without the test set, tests of a difference, and toys"
import csv, itertools, json, random
from collections import defaultdict
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from fastcore.foundation import L
from scipy import stats
from scipy.stats import ttest_rel
from statsmodels.stats.multitest import multipletests
from torch import nn
from torch.testing import assert_close
from fastai.basics import CrossEntropyLossFlat, Learner
from fastmix.lab import scale
from fastmix.lab.claims import all_claims, claims_table, plot_claims
from fastmix.lab.evidence import attack, attackable, best_runs, by_seed, changed, choose, compare, fashion_dls, fashion_mnist, holm, mean_spread
from fastmix.lab.evidence import memory, misled, paired, plot_dots, plot_seeds, read_runs, run_missing, tensor_dls, to_floats
from fashion_sample import expand
from fastmix.lab.toys import GaussianBatches, grid_centres, mode_coverage, ring_centres

settings = [dict(arm=arm, lr=lr, test=test, seed=seed) for arm in 'ab' for lr in (1e-3,.3) for test in (False,True) for seed in (1,2)]

class Runs:
    "Remembers what was run, and is interrupted once"
    def __init__(self, stop=None): self.seen,self.stop = [],stop
    def __call__(self, **setting):
        if len(self.seen)==self.stop: raise KeyboardInterrupt
        self.seen.append(setting)
        res = dict(error=setting['seed']/3, note=setting['arm'])
        return res | dict(curve=torch.tensor([setting['lr'],float('nan')])) if setting['test'] else res

@pytest.mark.parametrize('stop', [0, 1, 7, len(settings)-1])
def test_an_interrupted_experiment_goes_on(tmp_path, stop):
    first,second,path = Runs(stop),Runs(),tmp_path/'deep'/'runs.csv'
    with pytest.raises(KeyboardInterrupt): run_missing(path, first, settings)
    assert path.exists()==(stop>0)
    if stop: assert len(read_runs(path))==stop
    run_missing(path, second, settings)
    assert first.seen+second.seen==settings
    runs = read_runs(path)
    assert runs[list(settings[0])].to_dict('records')==settings
    assert_close(torch.tensor(runs.error), torch.tensor([o['seed']/3 for o in settings]).double(), rtol=1e-5, atol=0)
    assert not list(path.parent.glob('*.new'))
    done = path.read_text()
    run_missing(path, Runs(0), settings)
    assert path.read_text()==done

def test_results_may_be_lists_and_may_differ(tmp_path):
    run_missing(tmp_path/'runs.csv', Runs(), settings)
    runs = read_runs(tmp_path/'runs.csv')
    assert runs.columns[-1]=='curve' and runs[~runs.test].curve.isna().all()
    for row in runs[runs.test].itertuples(): np.testing.assert_allclose(row.curve, [row.lr,np.nan], rtol=1e-6)
    assert (runs.seconds>=0).all()

def test_runs_of_another_kind_are_not_added_to(tmp_path):
    path = tmp_path/'runs.csv'
    run_missing(path, Runs(), settings[:1])
    was = path.read_text()
    for other in (dict(arm='a', seed=1), dict(lr=.1, arm='a', test=True, seed=1)):
        with pytest.raises(ValueError, match='another kind of setting'): run_missing(path, Runs(), [other])
    assert path.read_text()==was

def test_runs_come_in_the_order_of_their_settings_and_all(tmp_path):
    path = tmp_path/'runs.csv'
    run_missing(path, Runs(), settings)
    wanted = [dict(reversed(o.items())) for o in settings[5:1:-1]]
    assert read_runs(path, wanted)[list(wanted[0])].to_dict('records')==wanted
    run_missing(path, Runs(0), [settings[0], *({k:o[k] for k in reversed(o)} for o in settings[1:])])
    with pytest.raises(ValueError, match='lacks 1 of 17 runs, such as.*\'seed\': 9'): read_runs(path, [*settings, settings[0]|dict(seed=9)])

def test_choosing_never_sees_the_test_set():
    rng = np.random.default_rng(0)
    rows = [dict(zip(('arm','n','lr','p','seed','test'), o), loss=rng.random()) for o in itertools.product('ab', (1,2), (1,2,3), (.1,.2), (8,9), (True,False))]
    found,reported = [f(pd.DataFrame(rows), ['lr','p'], 'loss', ['arm','n']) for f in (choose,best_runs)]
    for a in 'ab':
        for n in (1,2):
            def mean(lr, p): return np.mean([o['loss'] for o in rows if (o['arm'],o['n'],o['lr'],o['p'],o['test'])==(a,n,lr,p,False)])
            lr,p = min(((lr,p) for lr in (1,2,3) for p in (.1,.2)), key=lambda o: mean(*o))
            assert found[a,n]==dict(lr=lr, p=p)
            want = [o for o in rows if (o['arm'],o['n'],o['lr'],o['p'],o['test'])==(a,n,lr,p,True)]
            assert reported[(reported.arm==a) & (reported.n==n)].to_dict('records')==want

def test_of_several_that_do_equally_well_the_first_is_taken():
    pairs = {.1: (12.91,13.64), .2: (13.01,13.54)}   # of the same mean, which floats do not say
    assert np.mean(pairs[.1]) != np.mean(pairs[.2])
    for first,second in ((.1,.2),(.2,.1)):
        rows = [dict(arm='a', lr=lr, seed=s, test=False, error=e) for lr in (first,second) for s,e in enumerate(pairs[lr])]
        assert choose(pd.DataFrame(rows), 'lr')=={'a': {'lr': first}}

def some_runs(seeds=6, shift=-.5):
    rng = np.random.default_rng(3)
    shared = rng.normal(size=seeds)
    return pd.DataFrame([dict(arm=a, seed=s, error=10+shared[s]+m+rng.normal()/10) for a,m in [('mixed',shift),('ERM',0),('same',0)] for s in range(seeds)])

def test_compare_is_a_paired_test_with_holms_correction():
    runs = some_runs()
    errors = {a: g.sort_values('seed').error.values for a,g in runs.groupby('arm')}
    p = multipletests([ttest_rel(errors[a], errors['ERM']).pvalue for a in ('mixed','same')], method='holm')[1]
    res = compare(runs.sample(frac=1, random_state=0).sort_values('arm', key=lambda o: o.map(dict(mixed=0, ERM=1, same=2)), kind='stable'))
    assert res.index.tolist()==['ERM','mixed','same']
    np.testing.assert_allclose(res.p[1:].astype(float), p, rtol=.05)
    assert res.so.tolist()==['','lower','no difference found']
    assert compare(some_runs(shift=.5)).so['mixed']=='higher'
    d = errors['mixed']-errors['ERM']
    assert .1<d.std(ddof=1)<.9 and res.difference['mixed']==f'{d.mean():.2f}\xa0±\xa0{d.std(ddof=1):.2f}'

def test_compare_refuses_arms_with_other_seeds():
    runs = some_runs()
    with pytest.raises(ValueError, match="'mixed' has no error for seed 99: run it, or leave out that arm or that seed"):
        compare(pd.concat([runs, pd.DataFrame([dict(arm='ERM', seed=99, error=0.)])]))
    with pytest.raises(ValueError, match='several runs of a seed: take those of one model'): by_seed(pd.concat([runs, runs]))
    with pytest.raises(ValueError, match=r"base must be one of \['mixed', 'same'\], but it is 'ERM'"): compare(runs[runs.arm!='ERM'])
    with pytest.raises(ValueError, match="'same' has no error for seed 3"): compare(runs.assign(error=runs.error.mask((runs.arm=='same') & (runs.seed==3))))

def test_holm_is_that_of_statsmodels():
    for n in (1,2,9): np.testing.assert_allclose(holm(ps := np.random.default_rng(n).random(n)**3), multipletests(ps, method='holm')[1])

def test_arms_are_compared_by_seed_in_whatever_order_they_were_run():
    runs = some_runs().sample(frac=1, random_state=1)
    got = by_seed(runs, base='ERM')
    for a in runs.arm.unique():
        for s in range(6):
            mine,base = [runs[(runs.arm==o) & (runs.seed==s)].error.item() for o in (a,'ERM')]
            assert got[a][s]==mine-base and by_seed(runs)[a][s]==mine

def test_of_equal_results_no_difference_is_found():
    assert paired(pd.DataFrame({'a': [0.,0.,0.], 'b': [.9,1.,1.1]})).so.tolist()==['no difference found','higher']

def test_one_seed_has_no_spread_and_no_test():
    assert compare(some_runs(seeds=1)).so.tolist()==['','not tested','not tested']
    assert mean_spread(pd.Series([2.]))=='2'
    assert mean_spread(pd.Series([1.,3.]))=='2.0\xa0±\xa01.4'

def test_seeds_are_drawn_in_the_colour_of_their_mean():
    lines = plot_seeds([1,2], [[0,1],[2,5]], 'a').lines
    assert len({o.get_color() for o in lines})==1 and [o.get_label() for o in lines].count('a')==1
    np.testing.assert_allclose(lines[0].get_ydata(), [1,3])

def test_dots_stand_beside_their_names_from_the_top():
    ax = plot_dots({'a': [1,2,6], 'b': [4.]}, plt.figure().gca())
    assert [o.get_text() for o in ax.get_yticklabels()]==['a','b'] and ax.get_ylim()[0] > ax.get_ylim()[1]
    assert [[list(np.atleast_1d(v)) for v in o.get_data()] for o in ax.lines]==[[[1,2,6],[0,0,0]], [[3],[0]], [[4],[1]], [[4],[1]]]

over = dict(calibration=['eps','lr'], calibration_toys='lr', corrupt_labels=['alpha','p','lr'], adversarial='lr', generalisation=['alpha','p','eps','lr'], partners='lr',
    regression=['alpha','bandwidth','epochs'], imbalance=['alpha','lr'], regmixup='lr')
places = dict(calibration=['network'], calibration_toys=['toy_name'], corrupt_labels=['noise'], adversarial=['network'], generalisation=['network','n','epochs'],
    partners=[], regression=['table'], imbalance=[], regmixup=['network'])

def runs_of(root, name): return read_runs(root/f'nbs/tutorials/runs/{name}.csv')

charted = [   # the name in the chart, where its runs are, how the arms were chosen, what is compared, and what was found
    ('better calibrated: small models', 'calibration', dict(network='mlp'), 'error', 'calibration error', 'ERM', 'MixUp(.4)', 'lower'),
    ('better calibrated: small models', 'calibration', dict(network='cnn'), 'error', 'calibration error', 'ERM', 'MixUp(.4)', 'lower'),
    ('… chosen by their loss', 'calibration', dict(network='cnn'), 'loss', 'calibration error', 'ERM', 'MixUp(.4)', 'lower'),
    ('fewer errors: a small convolutional model', 'generalisation', dict(network='cnn', n=1000, test=True), None, 'error', 'ERM', 'MixUp(.4)', 'no difference found'),
    ('fewer errors: a small convolutional model', 'generalisation', dict(network='cnn', n=60_000, test=True), None, 'error', 'ERM', 'MixUp(.4)', 'lower'),
    ('… with CutMix', 'generalisation', dict(network='cnn', n=5000, test=True), None, 'error', 'ERM', 'CutMix', 'lower'),
    ('… a residual network', 'scale', dict(width=16, n=60_000, noise=0., raw=False), None, 'calibration error', 'ERM', 'MixUp(.4)', 'higher'),
    ('… each with its best learning rate', 'corrupt_labels', dict(noise=.5), 'error', 'error', 'ERM', 'mixup(1)', 'higher'),
    ('… fewer than with dropout', 'corrupt_labels', dict(noise=.5), 'error', 'error', 'dropout', 'mixup(1)', 'higher'),
    ('misled less by attacks: cnn', 'adversarial', dict(network='cnn'), 'error', 'ten steps', 'ERM', 'MixUp(.4)', 'higher'),
    ('imbalanced classes: fewer errors with Remix', 'imbalance', {}, 'error', 'error', 'ERM', 'Remix', 'lower'),
    ('better calibrated: RegMixup', 'regmixup', dict(network='mlp'), 'error', 'calibration error', 'ERM', 'RegMixUp(10)', 'lower'),
    ('… better than mixup', 'regmixup', dict(network='cnn'), 'error', 'calibration error', 'MixUp(.4)', 'RegMixUp(10)', 'higher'),
    ('… better samples', 'gans', dict(target='grid'), None, 'late_good', 'ERM', 'α = 0.2', 'lower')]

def from_csv(root, name, where, by, y, base, arm):
    "Results of two arms, seed by seed, by the csv module alone"
    with open(root/f'nbs/tutorials/runs/{name}.csv', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    def same(text, v): return text==str(v) or not isinstance(v, (str,bool)) and float(text)==v
    rows = [o for o in rows if all(same(o[k], v) for k,v in where.items())]
    def value(o): return json.loads(o[y])[2] if o[y].startswith('[') else float(o[y])
    def of(arm):
        mine = [o for o in rows if o['arm']==arm]
        if not by: return {o['seed']: value(o) for o in mine}
        def setting(o): return tuple(o[k] for k in L(over[name]))
        tried = defaultdict(list)
        for o in mine:
            if o['test']=='False': tried[setting(o)].append(float(o[by]))
        best = min(tried, key=lambda k: np.mean(tried[k]))
        return {o['seed']: value(o) for o in mine if o['test']=='True' and setting(o)==best}
    a,b = of(base),of(arm)
    assert a.keys()==b.keys()
    return np.array([a[k] for k in a]),np.array([b[k] for k in a])

@pytest.fixture(scope='module')
def claims(root): return all_claims(root/'nbs/tutorials/runs')

@pytest.mark.parametrize('line', charted, ids=lambda o: f'{o[0]} {list(o[2].values())}')
def test_the_chart_says_what_the_files_say(root, claims, line):
    "The change, its interval and its color, and on which side of the line it is"
    short,name,where,by,y,base,arm,so = line
    a,b = from_csv(root, name, where, by, y, base, arm)
    change = 100*(b-a).mean()/a.mean()
    half = 100*stats.sem(b-a)*stats.t.ppf(.975, len(a)-1)/a.mean()
    found = [(o,f) for o in claims if o.short==short for f in o.findings if f.change==pytest.approx(change, rel=1e-6)]
    assert len(found)==1
    claim,f = found[0]
    assert f.half==pytest.approx(half, rel=1e-6) and f.so==so
    ax = plot_claims([claim], [short], limit=1e4, ax=plt.figure().gca())
    sign = -1 if claim.want=='lower' else 1
    color = {claim.want: 'tab:blue', 'no difference found': 'tab:gray'}.get(so, 'tab:red')
    ends = [o for o in ax.lines if len(o.get_xdata())==2 and np.allclose(sorted(o.get_xdata()), sorted([sign*change-half,sign*change+half]))]
    marks = [o for o in ax.lines if len(o.get_xdata())==1 and np.allclose(o.get_xdata(), sign*change)]
    assert len(ends)==len(marks)==1 and {o.get_color() for o in ends+marks}=={color}
    plt.close('all')

def test_losses_are_on_the_first_page_as_wins_are(claims):
    "Each claim is there with all of its settings; about as many marks speak against mixup as for it"
    shown = [f for o in claims if o.short for f in o.findings]
    assert {o.page for o in claims if o.short}=={'calibration','generalisation','corrupt_labels','adversarial','residual','regression','gans','imbalance','regmixup'}
    assert len(shown)>60 and sum(f.so!='no difference found' for f in shown)>30

def test_the_table_of_claims_has_every_finding(claims):
    table = claims_table(claims)
    assert table.count('\n')==len(claims)+1 and all(f.text in table for o in claims for f in o.findings)

@pytest.mark.parametrize('name', over)
def test_reported_seeds_are_fresh_and_as_many_for_every_setting(root, name):
    runs = runs_of(root, name)
    tuned,reported = runs[~runs.test],runs[runs.test]
    assert not set(tuned.seed) & set(reported.seed)
    setting = [o for o in runs.columns[:runs.columns.get_loc('test')] if o!='seed']
    for _,group in reported.groupby(setting): assert sorted(group.seed)==list(range(1, len(group)+1)) and len(group) in (5,10)

@pytest.mark.parametrize('name', over)
def test_what_did_best_is_what_is_reported_of_every_arm(root, name):
    runs = runs_of(root, name)
    if name=='generalisation': runs = runs.assign(n=runs.n.replace(50_000, 60_000))
    arms = [*places[name],'arm']
    for by in dict(calibration=['error','loss'], calibration_toys=['loss'], regression=['lost']).get(name, ['error']):
        best = best_runs(runs, over[name], by, arms)
        assert set(best[arms].itertuples(index=False, name=None))==set(runs[arms].itertuples(index=False, name=None))

def test_a_missing_data_set_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'(?s){tmp_path}.*apt-get install dataset-fashion-mnist.*FashionMNIST.*download=True'): fashion_mnist(str(tmp_path))

def test_training_images_are_neither_chosen_nor_tested_by():
    def keys(x): return {o.numpy().tobytes() for o in x}
    dls,last = fashion_dls(2000, 1),fashion_dls(2000, 1, test=True)
    all_x,_,x_test,y_test = fashion_mnist()
    assert torch.equal(last.valid.dataset.tensors[0], to_floats(x_test)) and torch.equal(last.valid.dataset.tensors[1], y_test)
    assert torch.equal(dls.valid.dataset.tensors[0], to_floats(all_x[50_000:]))
    assert keys(dls.train.dataset.tensors[0]) <= keys(to_floats(all_x[:50_000]))

def test_random_labels_are_in_the_training_set_only():
    clean,noisy = fashion_dls(5000, 3),fashion_dls(5000, 3, noise=.5)
    (x,y),(x1,y1) = clean.train.dataset.tensors,noisy.train.dataset.tensors
    assert torch.equal(x, x1) and torch.equal(noisy.is_wrong, y!=y1) and not clean.is_wrong.any()
    assert abs(noisy.is_wrong.float().mean()-.45)<.02
    assert torch.equal(clean.valid.dataset.tensors[1], noisy.valid.dataset.tensors[1])

def test_memory_tells_true_labels_from_random_ones():
    dls = fashion_dls(2000, 3, noise=.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    with torch.no_grad(): model[1].bias[0] = 1000   # it predicts 0 for every image
    found = memory(Learner(dls, model, loss_func=CrossEntropyLossFlat()))
    labels = dls.train.dataset.tensors[1]
    for k,wrong in (('train error, true',False),('train error, random',True)):
        mine = [g!=0 for g,w in zip(labels.tolist(), dls.is_wrong.tolist()) if w==wrong]
        assert abs(found[k]-100*sum(mine)/len(mine))<1e-3

def test_an_epoch_sees_no_sample_twice():
    x = torch.arange(103.)
    dls = tensor_dls((x,x.long()), (x,x.long()), bs=10)
    first,second = [torch.cat([a for a,_ in dls.train]) for _ in range(2)]
    assert len(first)==len(first.unique())==100 and not torch.equal(first, second)
    assert torch.equal(torch.cat([a for a,_ in dls.valid]), x)

def test_one_step_is_the_sign_of_the_gradient():
    torch.manual_seed(0)
    model,x,y = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),torch.rand(20, 1, 28, 28),torch.randint(0, 10, (20,))
    raw = x.clone().requires_grad_()
    nn.functional.cross_entropy(model((raw-.286)/.353), y).backward()
    changed = attack(attackable(model), x.numpy(), y.numpy(), .1)
    assert_close(torch.from_numpy(changed), (x+.1*raw.grad.sign()).clamp(0, 1), atol=1e-4, rtol=0)

def test_stronger_attacks_are_stronger():
    torch.manual_seed(0)
    model,x = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.Tanh(), nn.Linear(64, 10)),torch.rand(200, 1, 28, 28)
    y = model((x-.286)/.353).argmax(1).numpy()
    net = attackable(model)
    wrong = {kind: (net.predict(attack(net, x.numpy(), y, .002, kind)).argmax(1)!=y).mean() for kind in ('one step','ten steps','margin')}
    assert 0 < wrong['one step'] <= wrong['ten steps'] <= wrong['margin']+.02 < 1

def test_what_misleads_one_model_is_tried_on_another():
    torch.manual_seed(0)
    x = torch.rand(60, 1, 28, 28)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(784, 10)) for _ in range(2)]
    y = nets[0]((x-.286)/.353).argmax(1)
    views = [attackable(o) for o in nets]
    images = changed(views[0], x.numpy(), y.numpy(), ('one step','ten steps'), (1,8))
    for view,net in zip(views, nets):
        for kind,found in misled(view, images, y.numpy()).items():
            for eps,o,error in zip((1,8), images[kind], found):
                assert np.abs(o-x.numpy()).max()==pytest.approx(eps/255, abs=1e-6)
                assert error==pytest.approx(100*(net((torch.from_numpy(o)-.286)/.353).argmax(1)!=y).double().mean().item())
    attacked,other = [misled(view, images, y.numpy()) for view in views]
    unchanged = misled(views[1], {'none': [x.numpy()]}, y.numpy())['none'][0]
    for kind in images: assert attacked[kind][0] < attacked[kind][1] and attacked[kind][1] > 90 and abs(other[kind][1]-unchanged) < 20

def test_cifar_knows_its_wrong_labels_and_is_attacked_as_it_is(monkeypatch):
    g = torch.Generator().manual_seed(0)
    def part(n): return torch.randint(0, 256, (n,3,32,32), generator=g, dtype=torch.uint8),torch.randint(0, 10, (n,), generator=g)
    data = part(200)+part(50)
    monkeypatch.setattr(scale, 'cifar10', lambda: data)
    for n in (0,201):
        with pytest.raises(ValueError, match=f'n must be from 1 to 200, but it is {n}'): scale.cifar_dls(n, 1)
    dls = scale.cifar_dls(120, 1, noise=.5)
    assert torch.equal(dls.is_wrong, dls.train.dataset.tensors[1]!=data[1][:120]) and .3 < dls.is_wrong.float().mean() < .6
    x,y,(mean,std) = scale.to_attack('cifar', 20)
    assert_close(torch.from_numpy(x)*255, data[2][:20].float())
    assert (y==data[3][:20].numpy()).all()
    seen = (torch.from_numpy(x)-torch.tensor(mean).view(3, 1, 1))/torch.tensor(std).view(3, 1, 1)
    assert_close(seen, dls.valid.dataset.tensors[0][:20], atol=1e-5, rtol=0)

def test_what_is_trained_at_scale_is_what_was_asked_for(tmp_path, monkeypatch):
    class Asked(Exception): pass
    def train(dls, mixer, p, epochs, width, cbs): raise Asked(dls, mixer, p, [type(o) for o in cbs])
    monkeypatch.setattr(scale, 'train_at_scale', train)
    for raw in (True,False):
        for noise,arm,kind,dropped in ((0.,'dropout(.3)',type(None),.3), (0.,'MixUp(8)',scale.MixUp,0), (.5,'dropout(.8)',type(None),.8), (.5,'MixUp(8) + dropout(.3)',scale.MixUp,.3)):
            with pytest.raises(Asked) as e: scale.scale(n=100, width=8, probes=7, raw=raw, noise=noise, arms=f'{arm};ERM', out=tmp_path/'scale.csv')
            dls,mixer,p,cbs = e.value.args
            assert isinstance(mixer, kind) and p==dropped and (mixer is None or mixer.alpha==8)
            assert (scale.ShiftFlip in cbs)!=raw and (scale.SkipValid in cbs)==(not noise)
            assert len(dls.train.dataset)==100 and len(dls.valid.dataset)==7 and bool(dls.is_wrong.any())==bool(noise)

def test_the_seed_decides_the_order_at_scale(tmp_path, monkeypatch):
    class Asked(Exception): pass
    def train(dls, *_): raise Asked(dls.train.one_batch()[1].tolist())
    monkeypatch.setattr(scale, 'train_at_scale', train)
    orders = []
    for before,arm in ((1,'ERM'), (2,'ERM'), (3,'MixUp(1)')):
        random.seed(before)
        with pytest.raises(Asked) as e: scale.scale(n=100, probes=7, arms=arm, out=tmp_path/'scale.csv')
        orders.append(e.value.args[0])
    assert orders[0]==orders[1]==orders[2]

def test_gaussians_lie_where_they_should():
    torch.manual_seed(0)
    for centres,n in [(ring_centres(),8),(ring_centres(5),5),(grid_centres(),25),(grid_centres(3),9)]:
        assert centres.shape==(n,2) and centres.mean(0).abs().max()<1e-6
        assert mode_coverage(GaussianBatches(centres, std=.1).draw(5000), centres, .1)[0]==n
    half = torch.cat([grid_centres()[:3],grid_centres()[:3]+.4])
    assert mode_coverage(half, grid_centres(), .1)==(3,.5)
    z,x = GaussianBatches(grid_centres(), bs=16).dls().one_batch()
    assert z.shape==x.shape==(16,2)

def test_a_sample_stands_in_for_the_data(tmp_path):
    "As many images as there are, in the same files, and of each class as many"
    x,y,x_test,y_test = fashion_mnist(expand(tmp_path/'sample'))
    assert x.shape==(60_000,1,28,28) and y.shape==(60_000,) and x_test.shape==(10_000,1,28,28) and y_test.unique().tolist()==list(range(10))
    assert len(x[:1000].unique(dim=0))==300 and x[:300].equal(x[300:600]) and y[:300].equal(y[300:600])
    assert y.bincount().tolist()==[6000]*10
