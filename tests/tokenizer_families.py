"""Small tokenizers of the public models' kinds, trained on a little text and saved as their model directories."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

STORY = "The quick brown fox   jumps over 1234 lazy dogs.\n\n\tNaïve café: x = f(y) + 2;\nשלום 漢字 😀\n"
TEXTS = [STORY.replace("fox", f"fox number {number}") for number in range(50)]
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Emoji, code, mixed scripts, leading spaces, control characters, a word without an end, and names of control tokens.
HARD = [
    STORY,
    "",
    " ",
    "\n",
    " leading",
    "   three leading, two behind  ",
    "  two  spaces \n\n\n newlines\r\n\ttab ",
    "def f(x):\n\tif x>0: return {'a': [1, 2]}  # no\n        return None\n",
    "<div class=\"a\">1,234.50 != 0x1F && a||b</div> it's WE'LL don't",
    "👩‍👩‍👧‍👦 family, 🇩🇪 flag, 👍🏽",
    "漢字かな交じり文 한국어 שלום عليكم Ελληνικά кириллица",
    "\x00\x01\x1b\x7f\x85\u2028\u200f\ufeff\ufffd",
    "a" * 100_000,
    "漢" * 1000,
]
SPECIAL = "<s></s><pad><unk><|endoftext|> <|begin_of_text|><|end_of_text|><|im_start|> </ s> <|endoftext |> <0x41>"


def gpt_neox() -> Tokenizer:
    """One token for BOS, EOS and unknown; runs of spaces are added tokens that are not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|padding|>"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in (8, 4, 3, 2)])
    return tokenizer


def llama_3() -> Tokenizer:
    """Whole words need no merges; the special tokens come last."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[bos])
    return tokenizer


def qwen() -> Tokenizer:
    """No BOS; one added token is special and one is not."""
    tokenizer = llama_3()
    content = json.loads(tokenizer.to_str())
    content |= {"added_tokens": [], "post_processor": None, "normalizer": {"type": "NFC"}}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<tool_call>"])
    return tokenizer


def llama_2() -> Tokenizer:
    """A space before every text, spaces as U+2581, and bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(spaces)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = [text.replace(" ", "▁") for text in TEXTS]
    # No pre-tokenizer: words are those between spaces only for the trainer.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = None
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


# How each names its control tokens: in tokenizer_config.json, and in config.json.
FAMILIES = {
    "gpt_neox": (gpt_neox, dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"), {}),
    "llama_3": (llama_3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}, {}),
    "qwen": (qwen, {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, {}),
    "llama_2": (
        llama_2,
        {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"},
        {},
    ),
}


def save(family: str, directory: Path) -> Path:
    """Writes what a model directory of that family holds of its tokenizer."""
    make, names, numbers = FAMILIES[family]
    directory.mkdir(parents=True, exist_ok=True)
    make().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    if numbers:
        (directory / "config.json").write_text(json.dumps(numbers))
    return directory


def sentencepiece_of_llama() -> bytes:
    """A `.model` file of Llama's kind: a dummy prefix, no normalisation, byte fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()
