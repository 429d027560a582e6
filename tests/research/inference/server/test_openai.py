"""OpenAI's client against the engine, which gives the tokens of transformers."""

import json

import httpx
import openai
import pytest
import torch
import transformers
from prometheus_client.parser import text_string_to_metric_families

from research.convert import load_directory
from research.inference.engine import Engine, EngineConfig
from research.inference.server import ServedTokenizer
from research.inference.server.answers import _name
from tests.research.inference.server.conftest import write_tokenizer
from tests.research.inference.server.fake import serving

PROMPT = "the cat sat"
CHAT = [{"role": "user", "content": "the café?"}]
NEW = 8


def write_model(folder):
    """A random Llama that transformers saves, with a tokenizer beside it."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    config = transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=128)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    described = (folder / "config.json").read_text()
    write_tokenizer(folder)
    ends = json.loads((folder / "config.json").read_text())["eos_token_id"]
    content = json.loads(described) | dict(eos_token_id=ends)
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "generation_config.json").unlink()  # it has another eos_token_id


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(model):
    return transformers.AutoModelForCausalLM.from_pretrained(model).eval()


@pytest.fixture(scope="module")
def server(model):
    tokenizer = ServedTokenizer(model)
    config = EngineConfig(slots=4, max_length=96, chunk=16, queue=16)
    engine = Engine(load_directory(model), config, tokenizer=tokenizer.plain)
    engine.warm_up()
    with serving(engine, tokenizer) as server:
        server.engine, server.tokenizer = engine, tokenizer
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def greedy(theirs, tokens, count=NEW):
    """The tokens that transformers generates, and their log-probabilities."""
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor([tokens]), max_new_tokens=count, do_sample=False, use_cache=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    new = out.sequences[0, len(tokens) :].tolist()
    logprobs = [
        logits[0].log_softmax(-1)[token].item()
        for logits, token in zip(out.logits, new, strict=True)
    ]
    return new, logprobs


def test_greedy_tokens_are_those_of_transformers(client, server, theirs):
    tokens = server.tokenizer.prompt(PROMPT)
    want, logprobs = greedy(theirs, tokens)
    for prompt in (PROMPT, tokens):
        answer = client.completions.create(
            model="small", prompt=prompt, max_tokens=NEW, temperature=0, logprobs=2
        )
        choice, usage = answer.choices[0], answer.usage
        names = [_name(server.tokenizer.text_of(token)) for token in want]
        assert choice.logprobs.tokens == names
        assert choice.logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-4)
        assert choice.text == server.tokenizer.decode(want)
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(tokens), len(want))
        assert choice.finish_reason == ("length" if len(want) == NEW else "stop")
        for top, logprob in zip(choice.logprobs.top_logprobs, logprobs, strict=True):
            assert max(top.values()) == pytest.approx(logprob, abs=1e-4) and len(top) == 2


def test_a_chat_is_that_of_transformers(client, server, theirs, model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    want, logprobs = greedy(theirs, prompt)
    ask = dict(model="small", messages=CHAT, max_tokens=NEW, temperature=0)
    answer = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    choice = answer.choices[0]
    assert choice.message.content == tokenizer.decode(want, skip_special_tokens=True)
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(logprobs, abs=1e-4)
    assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)
    raw = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert raw.decode(errors="replace") == tokenizer.decode(want)
    assert len(want) > 3
    assert answer.usage.prompt_tokens == len(prompt)
    # the same in pieces
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options=options))
    pieces = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert pieces[0].role == "assistant"
    assert "".join(piece.content or "" for piece in pieces) == choice.message.content
    assert chunks[-1].usage == answer.usage and chunks[-1].choices == []
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == choice.finish_reason
    assert choice.finish_reason == ("length" if len(want) == NEW else "stop")


def test_echo_gives_the_prompts_logprobs_and_no_more_tokens_than_asked_for(client, server, theirs):
    """The requests of lm-eval's local-completions: max_tokens of 1 and of 0."""
    tokens = server.tokenizer.prompt(PROMPT)
    with torch.no_grad():
        logits = theirs(torch.tensor([tokens])).logits[0].log_softmax(-1)
    want = [logits[i, token].item() for i, token in enumerate(tokens[1:])]
    for most in (0, 1):
        answer = client.completions.create(
            model="small", prompt=[tokens, tokens[:2], tokens[:1]], max_tokens=most, echo=True,
            logprobs=1, temperature=0, seed=1234,
        )  # fmt: skip
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        for choice, prompt in zip(answer.choices, (tokens, tokens[:2], tokens[:1]), strict=True):
            count = len(prompt)
            listed = choice.logprobs
            assert len(listed.tokens) == len(listed.text_offset) == count + most
            assert listed.token_logprobs[0] is None and listed.top_logprobs[0] is None
            got = listed.token_logprobs[1:count]
            assert got == pytest.approx(want[: count - 1], abs=1e-4)
            for i, top in enumerate(listed.top_logprobs[1:count]):
                assert max(top.values()) == pytest.approx(logits[i].max().item(), abs=1e-4)
            assert choice.text.startswith(server.tokenizer.decode(prompt))
            assert most or choice.text == server.tokenizer.decode(prompt)
        assert answer.usage.completion_tokens == 3 * most
    silent = client.completions.create(model="small", prompt=PROMPT, max_tokens=0)
    assert silent.choices[0].text == "" and silent.choices[0].finish_reason == "length"


def test_samples_prompts_seeds_and_streams_agree(client):
    ask = dict(model="small", prompt=["the", "cat sat"], n=3, max_tokens=6, seed=7, temperature=1.5)
    whole = client.completions.create(**ask)
    assert [choice.index for choice in whole.choices] == list(range(6))
    texts = [choice.text for choice in whole.choices]
    assert len(set(texts)) > 3
    assert [choice.text for choice in client.completions.create(**ask).choices] == texts
    other = client.completions.create(**{**ask, "seed": 8})
    assert [choice.text for choice in other.choices] != texts
    streamed, reasons = [""] * 6, {}
    for chunk in client.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert streamed == texts and len(reasons) == 6
    unseeded = {
        client.completions.create(**{**ask, "seed": None}).choices[0].text for _ in range(4)
    }
    assert len(unseeded) > 1


def test_stops_biases_and_penalties_reach_the_engine(client, server, theirs):
    tokens = server.tokenizer.prompt(PROMPT)
    want, _ = greedy(theirs, tokens)
    ask = dict(model="small", prompt=PROMPT, max_tokens=NEW, temperature=0)
    text = client.completions.create(**ask).choices[0].text
    stop = text[3:5]
    stopped = client.completions.create(**ask, stop=["\x00", stop]).choices[0]
    assert stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop"
    chosen = server.tokenizer.prompt("m", beginning=False)[0]
    biased = client.completions.create(**ask, logit_bias={str(chosen): 100}).choices[0]
    assert biased.text == "m" * NEW
    penalised = client.completions.create(
        **ask, logit_bias={str(chosen): 100}, frequency_penalty=2, presence_penalty=2,
        extra_body={"repetition_penalty": 100.0, "top_k": 5, "min_p": 0.1},
    )  # fmt: skip
    assert penalised.choices[0].text != "m" * NEW
    banned = client.completions.create(**ask, logit_bias={str(want[0]): -100}, logprobs=0)
    assert banned.choices[0].logprobs.token_logprobs[0] < 0
    assert banned.choices[0].text != text


def test_tokenize_is_what_the_other_routes_do(server, client):
    def count(body):
        return httpx.post(f"{server.address}/tokenize", json=body).raise_for_status().json()

    tokens = count({"prompt": PROMPT})
    assert tokens["tokens"] == server.tokenizer.prompt(PROMPT) and tokens["max_model_len"] == 96
    without = count({"prompt": PROMPT, "add_special_tokens": False})["tokens"]
    assert tokens["tokens"][1:] == without
    special = count({"prompt": "<|im_end|>", "add_special_tokens": False})
    assert special["count"] == 1
    chat = client.chat.completions.create(model="small", messages=CHAT, max_tokens=1)
    assert count({"messages": CHAT, "model": "small"})["count"] == chat.usage.prompt_tokens


def test_metrics_are_prometheus_text_and_count(server, client):
    def read():
        answer = httpx.get(f"{server.address}/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = text_string_to_metric_families(answer.text)
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }

    before = read()
    client.completions.create(model="small", prompt=PROMPT, max_tokens=5, temperature=0)
    after = read()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["ablate_generated_tokens_total",] == 5
    assert grown["ablate_answers_total", "/v1/completions", "200"] == 1
    assert grown["ablate_first_token_seconds_count",] == grown["ablate_answer_seconds_count",] == 1
    assert grown["ablate_answer_seconds_bucket", "+Inf"] == 1
    assert after["ablate_samples_running",] == after["ablate_samples_waiting",] == 0
    assert after["ablate_slots",] == 4
