"""The losses as plain float64 formulas on the whole vocabulary, one row at a time.

Shares nothing with nemo_kd but the settings: lists gather the classes, autograd differentiates.
"""

import torch
from torch import Tensor

from nemo_kd.loss import KDLossConfig


def reference_classes(
    z: Tensor,
    label: int,
    log_p: list[float],
    ids: list[int],
    log_r: float,
    tail: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(teacher log-probs, student log-probs) over the row's classes; z is `[V]` float64."""
    kept = {id_: lp for id_, lp in zip(ids, log_p, strict=True) if id_ >= 0}
    if tail == "label":
        merged = torch.tensor([kept.get(label, -torch.inf), log_r], dtype=torch.float64)
        kept[label] = merged.logsumexp(0).item()
    teacher = torch.tensor(list(kept.values()), dtype=torch.float64)
    log_q = (z / temperature).log_softmax(-1)
    student = log_q[list(kept)]
    if tail == "renormalize":
        return (teacher / temperature).log_softmax(-1), student.log_softmax(-1)
    outside = [id_ for id_ in range(len(z)) if id_ not in kept]
    if tail == "bucket" and outside:
        teacher = torch.cat([teacher, torch.tensor([log_r], dtype=torch.float64)])
        student = torch.cat([student, log_q[outside].logsumexp(-1, keepdim=True)])
    return teacher.log_softmax(-1), student


def reference_divergence(log_t: Tensor, log_s: Tensor, divergence: str, beta: float) -> Tensor:
    """D(t, s) with 0 log 0 = 0; reverse_kl drops the classes that the teacher rules out."""
    if divergence == "reverse_kl":
        possible = log_t > -torch.inf
        log_t, log_s = log_t[possible], log_s[possible].log_softmax(-1)
        return (log_s.exp() * (log_s - log_t)).sum()
    support = log_t > -torch.inf
    t, log_t_support, log_s_support = log_t[support].exp(), log_t[support], log_s[support]
    if divergence == "forward_kl":
        return (t * (log_t_support - log_s_support)).sum()
    s = log_s.exp()
    m = beta * log_t.exp() + (1 - beta) * s
    log_m = m.clamp(min=1e-300).log()
    teacher_kl = (t * (log_t_support - log_m[support])).sum()
    return beta * teacher_kl + (1 - beta) * (s * (log_s - log_m)).sum()


def reference_loss(
    logits: Tensor,
    labels: Tensor,
    log_probs: Tensor,
    ids: Tensor,
    tails: Tensor,
    config: KDLossConfig,
) -> dict[str, Tensor]:
    """loss, kd_loss, sft_loss and the metrics `[N]`; "gradient", dsum(loss)/dlogits `[N, V]`."""
    z_all = logits.detach().double().requires_grad_()
    columns: dict[str, list[Tensor]] = {}
    zero = torch.zeros((), dtype=torch.float64)
    for i, z in enumerate(z_all):
        label, row_ids, log_p = int(labels[i]), ids[i].tolist(), log_probs[i].double().tolist()
        row = {"sft_loss": -z.log_softmax(-1)[label], "kd_loss": zero * z.sum()}
        row |= dict.fromkeys(
            ("teacher_topk_mass", "student_topk_mass", "teacher_entropy", "top1_agreement"), zero
        )
        valid = {id_: lp for id_, lp in zip(row_ids, log_p, strict=True) if id_ >= 0}
        if valid:
            q = (z / config.temperature).softmax(-1)
            row["teacher_topk_mass"] = torch.tensor(list(valid.values())).double().exp().sum()
            row["student_topk_mass"] = q[list(valid)].sum()
            row["top1_agreement"] = (z[max(valid, key=valid.__getitem__)] == z.max()).double()
            log_t, log_s = reference_classes(
                z, label, log_p, row_ids, float(tails[i]), config.tail, config.temperature
            )
            if not log_t.isnan().any():  # all of the teacher's mass is gone: nothing to teach
                divergence = reference_divergence(log_t, log_s, config.divergence, config.jsd_beta)
                row["kd_loss"] = config.temperature**2 * divergence
                row["teacher_entropy"] = -(log_t.exp() * log_t.clamp(min=-1e300)).sum()
        row["loss"] = (
            config.kd_loss_weight * row["kd_loss"] + config.sft_loss_weight * row["sft_loss"]
        )
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    result = {name: torch.stack(values) for name, values in columns.items()}
    (result["gradient"],) = torch.autograd.grad(result["loss"].sum(), z_all)
    return {name: value.detach() for name, value in result.items()}
