"""`tersor serve`, spoken to with OpenAI's own client."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import tersor

openai = pytest.importorskip("openai")
DEMO = pathlib.Path(__file__).parents[2] / "models" / "demo"
PROMPT = "It was a dark and stormy night"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client of a server of the demo model, which is given a chat template."""
    model = tmp_path_factory.mktemp("serve") / "bard"
    shutil.copytree(DEMO, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")
    command = [sys.executable, "-c", "from tersor._command import main; main()", "serve", str(model), "--port", "0", "--strategy", "cached"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+/v1", server.stderr.readline())[0]
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    finally:
        server.terminate()
        assert server.wait(30) == 0


def test_completions_are_those_of_the_library(client):
    answer = client.completions.create(model="bard", prompt=PROMPT, max_tokens=16, temperature=0)
    expected = "".join(tersor.Model.open(str(DEMO)).stream(PROMPT, max_tokens=16))
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 16
    scored = client.completions.create(model="bard", prompt=PROMPT, max_tokens=1, temperature=0, logprobs=1, echo=True)
    logprobs = scored.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None and all(p <= 0 for p in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == scored.usage.total_tokens


def test_chat_streams(client):
    messages = [{"role": "user", "content": "Tell me of the sea."}]
    ask = {"model": "bard", "messages": messages, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.completion_tokens == 16
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content


def test_errors_come_by_kind(client):
    with pytest.raises(openai.NotFoundError, match="gpt"):
        client.completions.create(model="gpt", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="bard", messages=[{"role": "user", "content": "a"}], tools=[{"type": "function", "function": {"name": "f"}}])
    assert [m.id for m in client.models.list()] == ["bard"]
