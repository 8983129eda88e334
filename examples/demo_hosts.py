"""The demo's commands on each host: the same teacher, student, data, settings and steps."""

from pathlib import Path
from typing import ClassVar

from omegaconf import OmegaConf

EXAMPLES = Path(__file__).parent
# The settings of the runs are those of these presets, on the NeMo host by their names.
DUMP_PRESET, TRAIN_PRESET = "smollm2_cpu_dump", "smollm2_cpu"
DUMP, TRAIN = (
    OmegaConf.load(EXAMPLES / "conf" / "experiment" / f"{name}.yaml")
    for name in (DUMP_PRESET, TRAIN_PRESET)
)
# A script and its arguments.
Command = tuple[str | Path, ...]


class NeMo:
    """NeMo 2.4: .nemo files."""

    out = Path("outputs/demo")
    first_step = 0  # its number in the TensorBoard files
    objective = "model.knowledge_distillation"
    # A column of the results, and its tag in TensorBoard.
    tags: ClassVar = {
        "heldout_ce": "validation_loss",
        "kl_to_teacher": "validation_kd_loss_dataloader0",
        "top1_agreement": "validation_top1_agreement_dataloader0",
    }

    def import_model(self, out: Path, source: Path, name: str, layers: list[int] | None) -> Command:
        keep = [f"keep_layers={layers}".replace(" ", "")] if layers else []
        output = f"output={out}/{name}.nemo"
        return (EXAMPLES / "import_hf_llama.py", f"source={source}", output, *keep)

    def dump(self, out: Path, data: str, cache: str) -> Command:
        return (
            EXAMPLES / "dump_teacher_topk.py",
            f"+experiment={DUMP_PRESET}",
            f"teacher.restore_from_path={out}/teacher.nemo",
            f"data.file_names=[{out}/{data}.jsonl]",
            f"cache.path={out}/{cache}",
        )

    def train(self, out: Path, logs: Path, training: str, heldout: str) -> Command:
        return (
            EXAMPLES / "train_kd_sft.py",
            f"+experiment={TRAIN_PRESET}",
            f"model.restore_from_path={out}/student.nemo",
            f"model.data.train_ds.file_names=[{out}/{training}]",
            f"model.data.validation_ds.file_names=[{out}/{heldout}]",
            f"exp_manager.explicit_log_dir={logs}",
            "exp_manager.create_checkpoint_callback=false",
            "exp_manager.resume_if_exists=false",
        )

    def length(self, steps: int, validate_every: int) -> list[str]:
        return [f"trainer.max_steps={steps}", f"trainer.val_check_interval={validate_every}"]

    def save(self, out: Path, name: str) -> str:
        return f"save_to={out}/{name}.nemo"


class Bridge:
    """Megatron-Bridge: Hugging Face directories."""

    out = Path("outputs/demo-bridge")
    first_step = 1
    objective = "knowledge_distillation"
    tags: ClassVar = {
        "heldout_ce": "sft_loss validation",
        "kl_to_teacher": "kd_loss validation",
        "top1_agreement": "top1_agreement validation",
    }

    def import_model(self, out: Path, source: Path, name: str, layers: list[int] | None) -> Command:
        keep = ["--keep-layers", *map(str, layers)] if layers else []
        return (EXAMPLES / "bridge" / "gguf_to_hf.py", str(source), f"{out}/{name}-hf", *keep)

    def dump(self, out: Path, data: str, cache: str) -> Command:
        settings = dict(DUMP.data) | {"prompt_template": f"'{DUMP.data.prompt_template}'"}
        return (
            EXAMPLES / "bridge" / "dump_teacher_topk.py",
            "device=cpu",
            f"model.hf_path={out}/teacher-hf",
            f"data.file_names=[{out}/{data}.jsonl]",
            *(f"data.{key}={value}" for key, value in settings.items()),
            f"cache.samples_per_shard={DUMP.cache.samples_per_shard}",
            f"cache.path={out}/{cache}",
        )

    def train(self, out: Path, logs: Path, training: str, heldout: str) -> Command:
        data, optim = TRAIN.model.data.train_ds, TRAIN.model.optim
        return (
            EXAMPLES / "bridge" / "train_kd_sft.py",
            "device=cpu",
            f"model.hf_path={out}/student-hf",
            f"model.seq_length={data.max_seq_length}",
            "model.calculate_per_token_loss=false",  # the mean of micro batches, as NeMo's
            f"dataset.train_caches=[{out}/{training}]",
            f"dataset.validation_caches=[{out}/{heldout}]",
            f"dataset.num_workers={data.num_workers}",
            f"train.global_batch_size={data.global_batch_size}",
            f"train.micro_batch_size={data.micro_batch_size}",
            f"optimizer.lr={optim.lr}",
            # NeMo begins at one step of the warm-up, not at none.
            f"scheduler.lr_warmup_iters={optim.sched.warmup_steps}",
            f"scheduler.lr_warmup_init={optim.lr / (optim.sched.warmup_steps + 1)}",
            f"logger.tensorboard_dir={logs}",
        )

    def length(self, steps: int, validate_every: int) -> list[str]:
        if steps:
            return [f"train.train_iters={steps}", f"train.eval_interval={validate_every}"]
        return ["train.train_iters=0"]  # validates alone

    def save(self, out: Path, name: str) -> str:
        return f"save_hf={out}/{name}-hf"


HOSTS = {"nemo": NeMo(), "bridge": Bridge()}
