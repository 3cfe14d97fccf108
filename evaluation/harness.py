"""A model as EleutherAI's lm-evaluation-harness wants it: text in, log-likelihoods out."""

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import GPT
from run.errors import UserError, warn
from tokens.tokenizers import Tokenizer

Request = tuple[object, list[int], list[int]]  # the text, which is not used here, and the tokens of context and answer


class HarnessModel(TemplateLM):
    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_size: int = 16):
        super().__init__()
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the model has {model.config.vocab_size} tokens, but the vocabulary {tokenizer.name!r} "
                f"has {tokenizer.vocab_size}"
            )
        tokenizer.encode("")  # which fetches the vocabulary where it is not at hand
        self.model, self.text, self.batch_size = model.eval(), tokenizer, batch_size
        self._device = model.wte.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.text.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.text.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each request the log-likelihood of the answer in nats, and whether every token of it is the likeliest. Of
        what is longer than block_size the beginning is left out.
        """
        limit = self.model.config.block_size
        cut = sum(len(context) + len(answer) > limit + 1 for _, context, answer in requests)
        if cut:
            warn(f"{cut} of {len(requests)} texts are longer than block_size {limit}: their beginning is left out")
        same_input: dict[tuple[int, ...], list[int]] = {}  # answers that differ in their last token only share a pass
        for number, (_, context, answer) in enumerate(requests):
            if len(answer) > limit:
                raise UserError(f"an answer of {len(answer)} tokens is longer than the model's block_size {limit}")
            same_input.setdefault(tuple((context + answer)[-limit - 1 : -1]), []).append(number)
        inputs = sorted(same_input, key=len, reverse=True)  # so that what takes most memory comes first
        results = [(0.0, False)] * len(requests)
        with tqdm(total=len(inputs), desc="Texts", disable=disable_tqdm) as bar:
            for start in range(0, len(inputs), self.batch_size):
                batch = inputs[start : start + self.batch_size]
                padded = pad_sequence([torch.tensor(tokens) for tokens in batch], batch_first=True)  # (B, T)
                hidden = self.model.hidden(padded.to(self.device))  # (B, T, C); padding comes after what is used
                for states, tokens in zip(hidden, batch, strict=True):
                    for number in same_input[tokens]:
                        results[number] = self._score(states[: len(tokens)], requests[number][2])
                bar.update(len(batch))
        return results

    def _score(self, states: torch.Tensor, answer: list[int]) -> tuple[float, bool]:
        """Of an answer whose tokens are the last that the states (T, C) predict."""
        logits = F.linear(states[len(states) - len(answer) :], self.model.wte.weight).float()  # (tokens, V)
        labels = torch.tensor(answer, dtype=torch.long, device=self.device)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return -loss.item(), bool((logits.argmax(dim=-1) == labels).all())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text in nats, in pieces of block_size tokens."""
        pieces, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.model.config.block_size, 1)
            for context, piece in map(make_disjoint_window, windows):
                pieces.append((None, context, piece))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (score, _) in zip(owners, self._loglikelihood_tokens(pieces, disable_tqdm), strict=True):
            totals[number] += score
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("only given answers are scored; see evaluate.load_tasks")
