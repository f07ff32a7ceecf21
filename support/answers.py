"""What is read behind reasoning and extractor: how likely an answer's tokens are, and each of the possible answers.

Shape letters: B rows, R reads of a row (tokens.Choices), A columns of a read whose logits count, V vocabulary,
M possible answers.
"""

import logging

import torch

from support.engine import pad
from support.files import require
from support.tokens import LARGEST_SHARE, extensions


def answer_columns(length, read):
    """The columns that predict an answer where its `read`, all its tokens but the last, ends a sequence of so many
    tokens: column c predicts token c + 1."""
    return list(range(length - len(read) - 1, length))


def with_reads(tails, reads, later, device):
    """(ids [B * R, S], mask [B * R, S], columns) of B lists of ids, each with each of its row's R reads behind it.
    Column c predicts token c + 1: the columns are those of the `later` tokens behind the first, then of the answer."""
    sequences, columns = [], []
    for tail, row_reads in zip(tails, reads):
        for read in row_reads:
            sequences.append([*tail, *read])
            columns.append([*range(later), *answer_columns(len(sequences[-1]), read)])
    return *pad(sequences, device), columns


def read_answers(engine, context, extractor, reads):
    """Logits [B, R, A, V] at the `answer_columns` behind the extractor. reads: R lists of ids for each row.

    context: B rows that end with the reasoning, as `generate` hands them out; it stays as it is.
    """
    ids, mask, columns = with_reads([extractor] * len(reads), reads, 0, engine.device)
    logits = engine.forward(context.repeated(len(reads[0])), ids, mask, columns)
    return logits.unflatten(0, (len(reads), -1))


def choice_log_probs(logits, choices):
    """Log-probability [B, M] of each possible answer as a whole, from logits [B, R, A, V] of `Choices.reads`.

    An answer with which others begin counts only where none of these follows: "Account" less "Account access".
    """
    ids, real = pad(choices.answers, logits.device)  # [M, A]
    read = torch.tensor(choices.read_of, device=logits.device)[:, None]  # [M, 1]
    column = torch.arange(ids.shape[1], device=logits.device)[None]  # [1, A]
    each = logits[:, read, column, ids] - logits.logsumexp(-1)[:, read, column]  # [B, M, A]
    whole = each.masked_fill(real == 0, 0).sum(-1)  # [B, M]
    pairs = extensions(choices.answers)
    if not pairs:
        return whole
    longer = torch.zeros(len(ids), len(ids), dtype=torch.bool, device=logits.device)  # [M, M]
    for n, m in pairs:
        longer[n, m] = True
    share = (whole[:, None, :] - whole[:, :, None]).masked_fill(~longer, float("-inf")).exp().sum(-1)  # [B, M]
    return whole + torch.log1p(-share.clamp(max=LARGEST_SHARE))


def finite_rows(values, not_finite, hint):
    """bool [N]: which rows of values [N, ...] are numbers; the step goes on without the others, which are named.

    not_finite: what is wrong with those, in words; hint: a sentence on what may help. Errors: UserError if they are
    more than a tenth of the rows.
    """
    whole = values.isfinite().flatten(1).all(1)
    without = [number + 1 for number in (~whole).nonzero()[:, 0].tolist()]
    if without:
        where = f"{not_finite} in training rows {without[:8]} of {len(values)} (in the order of run.json)"
        require(len(without) <= len(values) / 10, f"{where}, more than a tenth.{hint}")
        logging.getLogger(__name__).warning("%s: left out here.%s", where, hint)
    return whole
