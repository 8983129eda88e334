"""Several caches in one run: drawn by probability, over epochs, with rows of unequal lengths."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from runs import run_example, scalars, train_arguments

from nemo_kd.cache import CacheWriter, TopKCache

PROBABILITIES = [0.6, 0.4]
NUM_STEPS, SEED = 24, 7
BATCH_SIZE = 2


def write_shorter(source: TopKCache, path: Path, num_samples: int, num_kept: int) -> TopKCache:
    """A cache of the last samples of another one, with fewer entries in a row."""
    manifest = replace(
        source.manifest,
        num_samples=num_samples,
        selection=source.manifest.selection | {"k": num_kept},
    )
    writer = CacheWriter.open(path, manifest)
    for shard in writer.missing_shards():
        with writer.shard(shard) as sink:
            for index in manifest.shard_samples(shard):
                sample = source[len(source) - num_samples + index]
                sample = sample._replace(
                    topk_ids=sample.topk_ids[:, :num_kept],
                    topk_log_probs=sample.topk_log_probs[:, :num_kept],
                )
                sink.add(**sample._asdict())
    return TopKCache.open(path)


def kd_losses(hf_student: Path, cache: TopKCache) -> list[torch.Tensor]:
    """The KD loss of each sample's supervised tokens, by the formula on Hugging Face's logits."""
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(hf_student)
    losses = []
    for sample in cache:
        positions = sample.loss_mask.nonzero()[0] - 1
        with torch.no_grad():
            logits = student(torch.from_numpy(sample.tokens).long()[None]).logits[0, positions]
        own = logits.gather(1, torch.from_numpy(sample.topk_ids).long()).log_softmax(-1)
        teacher = torch.from_numpy(sample.topk_log_probs).log_softmax(-1)
        losses.append((teacher.exp() * (teacher - own)).sum(-1))
    return losses


def blended_order(num_samples: list[int]) -> list[tuple[int, int]]:
    """(cache, sample) in the order of NeMo's BlendableDataset over NeMo's sample mappings."""
    from nemo.collections.nlp.data.language_modeling.megatron.base_dataset_utils import (
        get_datasets_weights_and_num_samples,
    )
    from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import (
        OnlineSampleMapping,
    )

    total = NUM_STEPS * BATCH_SIZE
    _, _, wanted = get_datasets_weights_and_num_samples(
        [PROBABILITIES[0], "a", PROBABILITIES[1], "b"], [total]
    )
    mappings = [
        OnlineSampleMapping(size, count[0], seed=SEED)
        for size, count in zip(num_samples, wanted, strict=True)
    ]
    order, taken = [], [0, 0]
    for number in range(total):
        behind = np.multiply(PROBABILITIES, max(number, 1)) - taken
        index = int(behind.argmax())
        order.append((index, int(mappings[index][taken[index]][0])))
        taken[index] += 1
    return order


def test_the_other_host_blends_in_the_same_order() -> None:
    from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import (
        OnlineSampleMapping,
    )

    from nemo_kd.student.sets import Blend

    sizes = [10, 6]

    class Ordered(list[tuple[int, int]]):
        def __init__(self, path: str, max_num_samples: int) -> None:
            number = int(path)
            mapping = OnlineSampleMapping(sizes[number], max_num_samples, seed=SEED)
            super().__init__((number, int(mapping[i][0])) for i in range(max_num_samples))

    blend = Blend(["0", "1"], PROBABILITIES, NUM_STEPS * BATCH_SIZE, Ordered)
    assert [blend[number] for number in range(len(blend))] == blended_order(sizes)


def test_a_blend_trains_on_each_sample_in_its_turn(
    nemos: dict[str, Path], hf_llamas: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    caches = [TopKCache.open(cache)]
    caches.append(write_shorter(caches[0], tmp_path / "shorter", num_samples=6, num_kept=3))
    logs = tmp_path / "logs"
    run_example(
        "train_kd_sft.py",
        *train_arguments(nemos["tied"], cache, cache, logs),
        f"model.data.train_ds.file_names=[{caches[0].path},{caches[1].path}]",
        f"model.data.train_ds.concat_sampling_probabilities={PROBABILITIES}".replace(" ", ""),
        f"model.data.train_ds.global_batch_size={BATCH_SIZE}",
        f"model.data.train_ds.micro_batch_size={BATCH_SIZE}",
        f"model.data.train_ds.seed={SEED}",
        f"trainer.max_steps={NUM_STEPS}",
        f"trainer.val_check_interval={NUM_STEPS}",
        "model.knowledge_distillation.tail=renormalize",
        "model.optim.lr=0.0",  # so that a step's loss tells which samples it saw
    )
    order = blended_order([len(cache) for cache in caches])
    losses = [kd_losses(hf_llamas["tied"], cache) for cache in caches]
    expected = []
    for start in range(0, len(order), BATCH_SIZE):
        batch = [losses[index][sample] for index, sample in order[start : start + BATCH_SIZE]]
        expected.append(float(torch.cat(batch).mean()))
    np.testing.assert_allclose(scalars(logs)["kd_loss"], expected, rtol=1e-4)

    for index, cache_ in enumerate(caches):
        counts = np.bincount([sample for which, sample in order if which == index])
        assert len(counts) == len(cache_)
        assert counts.min() >= 2, "epochs"
        assert counts.max() - counts.min() <= 2, "no epoch has a sample twice"
