"Hugging Face's Trainer: its mixed loss against the formula, sample by sample"
import warnings
import numpy as np, pytest, torch, torch.nn.functional as F, transformers
from sklearn.datasets import load_digits
from torch import nn, tensor
from fastmix.losses import MixLoss
from fastmix.manifold import ManifoldMixUp
from fastmix.mixers import CutMix, MixUp
from fastmix.plan import Plan
from fastmix.soft import SoftMix
from transformers import ASTConfig, ASTForAudioClassification, BatchEncoding, BertConfig, BertForSequenceClassification, TrainingArguments
from transformers import GPT2Config, GPT2ForSequenceClassification, ViTConfig, ViTForImageClassification, Wav2Vec2Config, Wav2Vec2ForSequenceClassification
from transformers.modeling_outputs import ImageClassifierOutput
from fastmix.trainer import MixTrainer, mix_named_inputs
from helpers import begin_rank, run_ranks, save_rank

digits = load_digits()
images = [dict(pixel_values=tensor(x).float()[None]/16, labels=int(y)) for x,y in zip(digits.images[:96], digits.target)]
no_dropout = dict(hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, **no_dropout)

def vit(**kwargs):
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **small, **dict(num_labels=10) | kwargs))

def bert(**kwargs):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=3, pad_token_id=0, **small, **kwargs))

def texts(n=48, seed=0):
    rng = np.random.default_rng(seed)
    def text(length): return [*rng.integers(1, 30, length),*[0]*(8-length)]
    ids = [text(length) for length in rng.integers(2, 9, n)]
    return [dict(input_ids=tensor(o), attention_mask=tensor(o).ne(0).long(), token_type_ids=tensor([0]*8), labels=int(o[0] % 3)) for o in ids]

class Spy(MixTrainer):
    "Keeps the loss, the plan, the predictions and the labels of each training batch"
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs['labels']
        loss,outputs = super().compute_loss(model, inputs, True, **kwargs)
        if model.training: self.seen.append((loss.item(), self.plan, outputs['logits'].detach(), labels, kwargs.get('num_items_in_batch')))
        return (loss,outputs) if return_outputs else loss

def run(tmp_path, model, items, mixer=None, resume=None, cls=Spy, **kwargs):
    trainer_args = {k: kwargs.pop(k) for k in ('compute_loss_func','eval_dataset') if k in kwargs}
    usual = dict(num_train_epochs=1, per_device_train_batch_size=16, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy='no', logging_steps=2)
    args = TrainingArguments(str(tmp_path), **usual | kwargs)
    trainer = cls(model=model, args=args, train_dataset=items, mixer=mixer or MixUp(1.), **trainer_args)
    trainer.seen = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.train(resume_from_checkpoint=resume)
    return trainer

def want(seen, eps=0.):
    _,plan,logits,y,n = seen
    def u(y): return F.cross_entropy(logits, y, reduction='none', label_smoothing=eps)
    lam,total = plan.lam,0.
    for i,j in enumerate(plan.idx.tolist()): total += (lam[i if len(lam)>1 else 0]*u(y)[i] + (1-lam[i if len(lam)>1 else 0])*u(y[j].expand(len(y)))[i]).item()
    return total/(len(y) if n is None else int(n))

def check(trainer, eps=0.):
    assert trainer.seen and any(o[1].k>1 for o in trainer.seen)
    for o in trainer.seen: assert o[0]==pytest.approx(want(o, eps), rel=1e-4)

@pytest.mark.parametrize('mixer', [MixUp(1.),CutMix(),MixUp(1., per_batch=True)], ids=repr)
def test_images(tmp_path, mixer): check(run(tmp_path, vit(), images, mixer))

def test_texts(tmp_path): check(run(tmp_path, bert(), texts()))

def test_audio(tmp_path):
    torch.manual_seed(0)
    classes = torch.randint(4, (32,)).tolist()
    spectrograms = ASTConfig(num_mel_bins=16, max_length=32, patch_size=8, frequency_stride=8, time_stride=8, num_labels=4, **small)
    check(run(tmp_path, ASTForAudioClassification(spectrograms), [dict(input_values=torch.randn(32, 16)+y, labels=y) for y in classes]))
    waves = Wav2Vec2Config(num_labels=4, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, conv_dim=(8,8),
        conv_stride=(5,4), conv_kernel=(10,8), num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        layerdrop=0., mask_time_prob=0., classifier_proj_size=8)
    items = [dict(input_values=torch.randn(2000)+y, attention_mask=torch.ones(2000).long(), labels=y) for y in classes]
    check(run(tmp_path, Wav2Vec2ForSequenceClassification(waves), items))

def test_batches_and_outputs_keep_their_class():
    batch = BatchEncoding(dict(pixel_values=torch.rand(4, 3), labels=tensor([0,1,2,0])))
    mixed = SoftMix(MixUp(1.), 3, x='pixel_values', y='labels')(batch)
    assert type(mixed) is BatchEncoding and mixed.labels.shape==(4,3) and batch.labels.shape==(4,)
    class Own(nn.Module):
        reduction = 'mean'
        def forward(self, pred, y): return F.cross_entropy(pred.logits, y, reduction=self.reduction)
    out,plan = ImageClassifierOutput(logits=torch.randn(4, 3, requires_grad=True)),MixUp(1.).draw(torch.rand(4, 3))
    torch.testing.assert_close(MixLoss(Own())(out, batch.labels, plan=plan), MixLoss(nn.CrossEntropyLoss())(out.logits, batch.labels, plan=plan))

def test_label_smoothing(tmp_path): check(run(tmp_path, vit(), images, label_smoothing_factor=.2), .2)

def test_a_loss_function_of_its_own(tmp_path):
    def loss_func(outputs, labels, num_items_in_batch=None): return F.cross_entropy(outputs['logits'], labels, reduction='sum')/num_items_in_batch
    check(run(tmp_path, vit(), images, compute_loss_func=loss_func))

def test_accumulated_gradients(tmp_path):
    trainer = run(tmp_path, vit(), images, gradient_accumulation_steps=3)
    check(trainer)
    assert len({o[1].lam.sum().item() for o in trainer.seen})==len(trainer.seen)==6

def test_several_labels_are_blended(tmp_path):
    items = [o | dict(labels=F.one_hot(tensor(o['labels']), 10).float()) for o in images]
    for loss,plan,logits,y,_ in run(tmp_path, vit(problem_type='multi_label_classification'), items).seen:
        assert loss==pytest.approx(F.binary_cross_entropy_with_logits(logits, plan.mix(y)).item(), rel=1e-5)

def test_evaluation_is_not_mixed(tmp_path):
    trainer = run(tmp_path, vit(), images, eval_dataset=images)
    model = trainer.model.eval()
    x,y = torch.stack([o['pixel_values'] for o in images]),tensor([o['labels'] for o in images])
    with torch.no_grad(): loss = F.cross_entropy(model(x).logits, y).item()
    assert trainer.evaluate()['eval_loss']==pytest.approx(loss, rel=1e-4)
    logged = [o for o in trainer.state.log_history if 'loss' in o]
    assert logged and all(o['mixed']==1 for o in logged) and not any('mixed' in o for o in trainer.state.log_history if 'eval_loss' in o)

def test_resumed_as_if_not_interrupted(tmp_path):
    whole = run(tmp_path/'a', bert(), texts(96), save_strategy='steps', save_steps=3)   # a ViT of transformers 5.24 is not loaded as it was saved
    rest = run(tmp_path/'b', bert(), texts(96), resume=str(tmp_path/'a'/'checkpoint-3'))
    assert [o[1].lam.tolist() for o in rest.seen]==[o[1].lam.tolist() for o in whole.seen[3:]]
    for a,b in zip(whole.model.parameters(), rest.model.parameters()): torch.testing.assert_close(a, b)

def test_alpha_0_trains_as_without(tmp_path):
    mixed = run(tmp_path, vit(), images, MixUp(0.))
    args = mixed.args
    plain = transformers.Trainer(model=vit(), args=args, train_dataset=images)
    plain.train()
    for a,b in zip(mixed.model.parameters(), plain.model.parameters()): assert a.equal(b)

def test_masks_count_what_any_part_has():
    plan = Plan.of(tensor([1,0]), tensor([.7,1.]))
    mask = tensor([[1,0,0],[1,1,0]])
    assert mix_named_inputs(plan, dict(attention_mask=mask), None)['attention_mask'].tolist()==[[1,1,0],[1,1,0]]

@pytest.mark.parametrize(('items','model','mixer','match'), [
    (texts(), bert, CutMix(), 'Tokens cannot be cut'),
    ([o | dict(token_type_ids=torch.randint(2, (8,))) for o in texts()], bert, MixUp(1.), 'token_type_ids holds integers that differ'),
    (images, vit, ManifoldMixUp(1., layers='vit'), 'cannot mix in a Trainer'),
    (images, vit, .4, r'MixTrainer\(..., mixer=MixUp\(.4\)\)')])
def test_errors(tmp_path, items, model, mixer, match):
    with pytest.raises((ValueError,TypeError), match=match): run(tmp_path, model(), items, mixer)

def test_a_model_that_looks_at_the_tokens_themselves(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    items = [{k: v for k,v in o.items() if k!='token_type_ids'} for o in texts()]
    with pytest.raises(ValueError, match='GPT2ForSequenceClassification predicts otherwise from inputs_embeds'): run(tmp_path, GPT2ForSequenceClassification(config), items)

def test_a_model_with_a_loss_that_is_none_of_pytorch_s(tmp_path):
    class Own(ViTForImageClassification):
        def forward(self, pixel_values, labels=None):
            logits = super().forward(pixel_values).logits
            return dict(loss=-logits.log_softmax(1)[range(len(labels)),labels].mean(), logits=logits)
    with pytest.raises(RuntimeError, match='trains on targets of a mixed batch'): run(tmp_path, Own(vit().config), images)

class Weighted(MixTrainer):
    "A loss of its own in `compute_loss`, as the documentation of transformers shows"
    weight = torch.linspace(.5, 2., 10)
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop('labels')
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, weight=self.weight)
        self.seen.append((loss.item(), self.plan, outputs.logits.detach(), labels))
        return (loss,outputs) if return_outputs else loss

def test_a_subclass_that_computes_the_loss(tmp_path):
    for loss,plan,logits,y in run(tmp_path, vit(), images, cls=Weighted).seen:
        terms = [(lam*Weighted.weight[y[j]], F.cross_entropy(logits[i:i+1], y[j:j+1])) for i in range(len(y)) for lam,j in zip(plan.weights[i], plan.pairs[i])]
        assert loss==pytest.approx((sum(w*u for w,u in terms)/sum(w for w,_ in terms)).item(), rel=1e-4)

class Nested(nn.Module):
    "Looks at numbers in a dict and in a list"
    def __init__(self):
        super().__init__()
        self.a,self.seen = nn.Linear(3, 3),[]
    def forward(self, meta, more, labels=None):
        self.seen.append((meta['age'].clone(),more[0].clone()))
        logits = self.a(torch.cat([meta['age'],more[0]], 1))
        return dict(loss=F.cross_entropy(logits, labels), logits=logits)

def collate_nested(items):
    return dict(meta=dict(age=torch.stack([o['age'] for o in items])), more=[torch.stack([o['more'] for o in items])], labels=tensor([o['labels'] for o in items]))

def test_nested_inputs(tmp_path):
    items = [dict(age=torch.rand(2), more=torch.rand(1), labels=i%3) for i in range(16)]
    model = Nested()
    args = TrainingArguments(str(tmp_path), num_train_epochs=1, per_device_train_batch_size=16, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy='no', remove_unused_columns=False)
    trainer = MixTrainer(model=model, args=args, train_dataset=items, data_collator=collate_nested, mixer=MixUp(1.))
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(items, 16, collate_fn=collate_nested)
    trainer.train()
    batch = collate_nested(items)
    (age,more), = model.seen
    torch.testing.assert_close(age, trainer.plan.mix(batch['meta']['age']))
    torch.testing.assert_close(more, trainer.plan.mix(batch['more'][0]))

def test_padding_without_a_mask(tmp_path):
    "Only a later batch has padding"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    def item(n): return dict(input_ids=torch.cat([torch.randint(1, 30, (n,)),torch.zeros(8-n, dtype=torch.long)]), labels=0)
    with pytest.raises(ValueError, match='predicts otherwise from inputs_embeds'):
        run(tmp_path, GPT2ForSequenceClassification(config), [item(8)]*16 + [item(4)]*16, train_sampling_strategy='sequential')

def test_masks_of_other_numbers():
    plan = Plan.of(tensor([1,0]), tensor([.9,.9]))
    for mask in tensor([[1,1,0],[3,0,0]]),tensor([[.2,.5],[.6,.1]]):
        with pytest.raises(ValueError, match='organ_mask must hold only 0 and 1'): mix_named_inputs(plan, dict(organ_mask=mask), None)

def test_images_of_bytes(tmp_path):
    with pytest.raises(ValueError, match='the batch has none among pixel_values.*convert images to floats'): run(tmp_path, vit(), [o | dict(pixel_values=(16*o['pixel_values']).byte()) for o in images])

@pytest.fixture(scope='module')
def ranks(tmp_path_factory): return run_ranks(__file__, tmp_path_factory.mktemp('ranks'))

def test_two_processes_stay_in_step_and_mix_differently(ranks):
    a,b = ranks
    for p,q in zip(a['params'], b['params'], strict=True): assert p.equal(q)
    assert len(a['lams'])==len(b['lams'])==3 and not any(o.equal(p) for o,p in zip(a['lams'], b['lams']))
    for r in ranks: assert r['losses']==pytest.approx(r['wants'], rel=1e-4)

if __name__=='__main__':
    out,rank = begin_rank()
    trainer = run(out, vit(), images)
    seen = trainer.seen   # the Trainer divides the sum by the samples of all processes, and multiplies by the number of these
    save_rank(dict(params=[p.detach() for p in trainer.model.parameters()], lams=[o[1].lam for o in seen], losses=[o[0] for o in seen],
        wants=[want(o)*(1 if o[4] is None else 2) for o in seen]), out, rank)
