"""A released folder of a tiny random Qwen3 that opens blocks often."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from megatron_parallel_r1.architecture.model_config import ModelConfig
from megatron_parallel_r1.checkpoint_formats.hf_folder import save_hf_folder
from megatron_parallel_r1.rollout.settings import Thinking
from megatron_parallel_r1.thought.tags import TAG_TEXTS, Tags
from megatron_parallel_r1.thought.tokenizer import add_tags
from tests.reference.traces import TAGS
from tests.unit.rollout.tiny import VOCABULARY, tiny_qwen3

THINKING = Thinking(
    mode="isolated", paths=3, max_blocks=4, max_path_tokens=40, max_response_tokens=3000, reserve_tokens=10
)
EXAMPLES = ["w8 w9 w10", "w8 <b>unheard</b>"]
# Words that a page must show and not run.
ODD = ("<b>bold</b>", "<script>document.title='run'</script>", "&amp;", "<img/src=x/onerror=alert(1)>")


def words() -> list[str]:
    """All words in the order of their ids, the tags' ids those of `TAGS`."""
    plain = [f"w{number}" for number in range(7, VOCABULARY - len(ODD))]
    return [*TAG_TEXTS, "<eos>", *plain, *ODD]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; a word that it does not know is `w7`."""
    inner = Tokenizer(WordLevel({word: id for id, word in enumerate(words())}, unk_token="w7"))
    inner.pre_tokenizer = WhitespaceSplit()
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", unk_token="w7", clean_up_tokenization_spaces=False
    )
    tags: Tags = add_tags(fast_tokenizer)
    assert tags == TAGS
    return fast_tokenizer


def write_release(folder: Path, thinking: Thinking = THINKING, template: str = "w9 {problem}") -> Path:
    """Writes the folder as `curriculum/run.py` does, and returns it.

    In float64: a row's rounding depends on what else is in its batch, and in float32 that now and
    then moves a draw to the next token, so that a request among others would not be as if alone.
    """
    model = tiny_qwen3().double()
    settings = thinking.model_dump() | {"prompt": "plain", "prompt_template": template, "examples": EXAMPLES}
    save_hf_folder(
        folder,
        ModelConfig.from_hf(model.config.to_dict()),
        model.state_dict().items(),
        tokenizer(),
        {"thinking.json": json.dumps(settings)},
    )
    return folder
