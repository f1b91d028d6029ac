//! `tersor serve`, spoken to over HTTP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::Scratch;

const PROMPT: &str = "It was a dark and stormy night";
/// The pattern of a chat template.
const TEMPLATE: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:";

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo")
}

/// A copy of the demo model that has a chat template.
fn chat_model(scratch: &Scratch) -> PathBuf {
    let dir = scratch.path("talker");
    std::fs::create_dir(&dir).unwrap();
    for entry in std::fs::read_dir(demo()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
    }
    std::fs::write(dir.join("chat_template.jinja"), TEMPLATE).unwrap();
    dir
}

/// A running server.
struct Server {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
    address: String,
    agent: ureq::Agent,
    _scratch: Scratch,
}

impl Server {
    fn new(scratch: Scratch, model: &Path, options: &[&str]) -> Self {
        // The strategy is named, so that no machine is measured.
        let mut command = scratch.command(&["serve", model.to_str().unwrap(), "--port", "0", "--strategy", "fused"]);
        let mut child = command.args(options).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        let address = line.split("http://").nth(1).and_then(|rest| rest.split("/v1").next());
        let address = address.unwrap_or_else(|| panic!("no address: {line}")).to_owned();
        let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(300)));
        Self { child, stderr, address, agent: config.build().into(), _scratch: scratch }
    }

    fn demo(options: &[&str]) -> Self {
        Self::new(Scratch::new(), &demo(), options)
    }

    /// Status and body of the answer to a request.
    fn send(&self, path: &str, body: &str) -> (u16, String) {
        let request = self.agent.post(format!("http://{}{path}", self.address)).content_type("application/json");
        let mut response = request.send(body).unwrap();
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    }

    /// The answer to a request that succeeds.
    fn ok(&self, path: &str, body: &Value) -> Value {
        let (status, text) = self.send(path, &body.to_string());
        assert_eq!(status, 200, "{body}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    fn complete(&self, body: &Value) -> Value {
        self.ok("/v1/completions", body)
    }

    /// The message of a request that fails with `status`.
    fn fails(&self, status: u16, path: &str, body: &str) -> String {
        let (found, text) = self.send(path, body);
        assert_eq!(found, status, "{body}: {text}");
        let error: Value = serde_json::from_str(&text).unwrap();
        let message = error["error"]["message"].as_str().unwrap_or_else(|| panic!("{text}")).to_owned();
        assert!(!message.is_empty() && !message.contains('\n'), "{message}");
        message
    }

    /// The events of a stream, less the last, `[DONE]`.
    fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let (status, text) = self.send(path, &body.to_string());
        assert_eq!(status, 200, "{text}");
        let mut data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{text}");
        data.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap()
}

fn greedy(prompt: &str, tokens: usize) -> Value {
    json!({"prompt": prompt, "max_tokens": tokens, "temperature": 0})
}

#[test]
fn answers_are_those_of_generate_alone_or_together_at_once_or_in_pieces() {
    let server = Server::demo(&["--sequences", "3"]);
    let prompts = [PROMPT, "The captain", "Once upon a time there was a", "She", "No one had ever seen the house", "London"];
    let scratch = Scratch::new();
    let expected: Vec<String> = prompts
        .iter()
        .map(|prompt| {
            let report =
                scratch.json(&["generate", demo().to_str().unwrap(), "--prompt", prompt, "-n", "24", "--strategy", "cached", "--json"]);
            report["text"].as_str().unwrap().to_owned()
        })
        .collect();
    let alone = server.complete(&greedy(prompts[0], 24));
    assert_eq!(text(&alone), expected[0]);
    assert_eq!((&alone["object"], &alone["model"]), (&json!("text_completion"), &json!("demo")));
    assert_eq!(alone["choices"][0]["finish_reason"], "length");
    let usage = &alone["usage"];
    assert_eq!(usage["completion_tokens"], 24);
    assert_eq!(usage["total_tokens"].as_u64(), Some(24 + usage["prompt_tokens"].as_u64().unwrap()));
    // More at a time than there are places, from several clients and in one request.
    let together: Vec<String> = std::thread::scope(|scope| {
        let clients: Vec<_> = prompts.iter().map(|prompt| scope.spawn(|| text(&server.complete(&greedy(prompt, 24))).to_owned())).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(together, expected);
    let batch = server.complete(&json!({"prompt": prompts, "max_tokens": 24, "temperature": 0}));
    for (index, (choice, expected)) in batch["choices"].as_array().unwrap().iter().zip(&expected).enumerate() {
        assert_eq!((&choice["index"], &choice["text"]), (&json!(index), &json!(expected)));
    }
    let body =
        json!({"prompt": prompts[..2], "max_tokens": 24, "temperature": 0, "stream": true, "stream_options": {"include_usage": true}});
    let mut events = server.stream("/v1/completions", &body);
    let usage = events.pop().unwrap();
    assert_eq!((usage["choices"].as_array().unwrap().len(), &usage["usage"]["completion_tokens"]), (0, &json!(48)));
    let mut texts = [String::new(), String::new()];
    let mut finished = [0, 0];
    for event in &events {
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        texts[index] += choice["text"].as_str().unwrap();
        finished[index] += usize::from(choice["finish_reason"] == "length");
    }
    assert_eq!((&texts[..], finished), (&expected[..2], [1, 1]));
    assert!(events.len() > 20, "pieces come as they are made: {}", events.len());
}

#[test]
fn an_answer_ends_before_a_stop_string() {
    let server = Server::demo(&[]);
    let whole = text(&server.complete(&greedy(PROMPT, 40))).to_owned();
    // Within a word, so that no token ends there.
    let word = whole.split_whitespace().find(|word| word.len() > 4).unwrap();
    let stop = &word[1..word.len() - 1];
    let expected = &whole[..whole.find(stop).unwrap()];
    let body = json!({"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stop": [stop, "never said"]});
    let answer = server.complete(&body);
    assert_eq!((text(&answer), &answer["choices"][0]["finish_reason"]), (expected, &json!("stop")));
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() < 40);
}

#[test]
fn scores_are_those_of_eval() {
    let server = Server::demo(&[]);
    let scratch = Scratch::new();
    let book = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals.";
    std::fs::write(scratch.path("book"), book).unwrap();
    let report = scratch.json(&["eval", demo().to_str().unwrap(), "--text", "book", "--json"]);
    // As lm-eval asks: the prompt and one token more.
    for (tokens, more) in [(0, 0), (1, 1)] {
        let body = json!({"prompt": book, "max_tokens": tokens, "temperature": 0, "logprobs": 2, "echo": true});
        let answer = server.complete(&body);
        assert!(text(&answer).starts_with(book));
        let scores = &answer["choices"][0]["logprobs"];
        let own = scores["token_logprobs"].as_array().unwrap();
        assert_eq!(own.len() as u64, report["tokens"].as_u64().unwrap() + more);
        assert!(own[0].is_null(), "nothing comes before the first token");
        let known = &own[1..own.len() - more as usize];
        let nll = -known.iter().map(|score| score.as_f64().unwrap()).sum::<f64>() / known.len() as f64;
        assert!((nll - report["nll"].as_f64().unwrap()).abs() < 1e-4, "{nll} for {report}");
        for (token, (score, top)) in
            scores["tokens"].as_array().unwrap().iter().zip(own.iter().zip(scores["top_logprobs"].as_array().unwrap())).skip(1)
        {
            let top = top.as_object().unwrap();
            assert!((2..=3).contains(&top.len()), "{top:?}");
            let best = top.values().filter_map(Value::as_f64).fold(f64::NEG_INFINITY, f64::max);
            assert!(top[token.as_str().unwrap()].as_f64() >= score.as_f64() && best <= 0.0, "{token} {score} {top:?}");
        }
        // Greedy: what was generated is the likeliest.
        if more > 0 {
            let top = scores["top_logprobs"].as_array().unwrap().last().unwrap().as_object().unwrap();
            let best = top.values().filter_map(Value::as_f64).fold(f64::NEG_INFINITY, f64::max);
            assert_eq!(own.last().unwrap().as_f64(), Some(best));
        }
    }
}

#[test]
fn conversations_follow_the_template_and_keep_their_cache() {
    let scratch = Scratch::new();
    let model = chat_model(&scratch);
    let server = Server::new(scratch, &model, &["--sequences", "2", "--name", "bard"]);
    let models: Value = server.agent.get(format!("http://{}/v1/models", server.address)).call().unwrap().body_mut().read_json().unwrap();
    assert_eq!(models["data"][0]["id"], "bard");
    let mut messages = vec![json!({"role": "system", "content": "Tell stories."}), json!({"role": "user", "content": "Begin."})];
    let ask = |messages: &[Value]| json!({"model": "bard", "messages": messages, "max_completion_tokens": 12, "temperature": 0});
    let answer = server.ok("/v1/chat/completions", &ask(&messages));
    let content = answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let plain = server.complete(&greedy("system: Tell stories.\nuser: Begin.\nassistant:", 12));
    assert_eq!((content.as_str(), &answer["choices"][0]["message"]["role"]), (text(&plain), &json!("assistant")));
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    messages.extend([json!({"role": "assistant", "content": content}), json!({"role": "user", "content": "Go on."})]);
    let mut streamed = ask(&messages);
    streamed["stream"] = json!(true);
    let events = server.stream("/v1/chat/completions", &streamed);
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    let pieces: String = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    let again = server.ok("/v1/chat/completions", &ask(&messages));
    assert_eq!(again["choices"][0]["message"]["content"], pieces.as_str());
    let usage = &again["usage"];
    let [prompt, cached] = [&usage["prompt_tokens"], &usage["prompt_tokens_details"]["cached_tokens"]].map(|n| n.as_u64().unwrap());
    assert_eq!(cached, prompt - 1, "all but the last token passed through the model before");
}

#[test]
fn a_client_that_leaves_makes_room() {
    let server = Server::demo(&["--sequences", "1"]);
    let long = |stream: bool| json!({"prompt": PROMPT, "max_tokens": 1000, "temperature": 0, "ignore_eos": true, "stream": stream});
    let start = Instant::now();
    server.complete(&long(false));
    let whole = start.elapsed();
    let body = long(true).to_string();
    let mut impatient = TcpStream::connect(&server.address).unwrap();
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    impatient.write_all((head + &body).as_bytes()).unwrap();
    let mut first = [0; 16];
    impatient.read_exact(&mut first).unwrap();
    assert_eq!(&first[..12], b"HTTP/1.1 200");
    drop(impatient);
    let start = Instant::now();
    server.complete(&greedy("The", 1));
    assert!(start.elapsed() < whole / 2, "the only place was free long before that answer could have ended");
}

#[test]
fn what_is_wrong_is_refused_in_one_line() {
    let server = Server::demo(&["--context", "64"]);
    let path = "/v1/completions";
    let refused = |status, body: Value| server.fails(status, path, &body.to_string());
    assert!(server.fails(400, path, "{").contains("JSON"));
    assert!(server.fails(422, path, "{}").contains("prompt"));
    assert!(server.fails(422, path, r#"{"prompt": 3}"#).contains("prompt"));
    assert!(server.fails(405, "/v1/models", "{}").contains("GET"));
    assert!(server.fails(404, "/v1/nothing", "{}").contains("/v1/completions"));
    assert!(refused(404, json!({"prompt": "a", "model": "gpt"})).contains("gpt"));
    assert!(refused(400, json!({"prompt": "a", "n": 2})).contains("n above 1"));
    assert!(refused(400, json!({"prompt": "a", "temperature": -1})).contains("temperature"));
    assert!(refused(400, json!({"prompt": []})).contains("prompt"));
    assert!(refused(400, json!({"prompt": "word ".repeat(100)})).contains("64"));
    assert!(refused(400, json!({"prompt": [5000]})).contains("5000"));
    let message = server.fails(400, "/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "a"}]}).to_string());
    assert!(message.contains("chat template"));
    // None of it has harmed the server.
    assert_eq!(text(&server.complete(&greedy(PROMPT, 3))), text(&server.complete(&greedy(PROMPT, 3))));
    let port = server.address.rsplit(':').next().unwrap();
    let taken = Scratch::new().fails(1, &["serve", demo().to_str().unwrap(), "--port", port]);
    assert!(taken.contains(&server.address), "{taken}");
}

#[test]
fn a_signal_ends_answers_where_they_are_and_the_command_well() {
    let mut server = Server::demo(&[]);
    let body = json!({"prompt": PROMPT, "max_tokens": 1000, "ignore_eos": true, "stream": true}).to_string();
    let mut client = TcpStream::connect(&server.address).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n";
    client.write_all(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
    let mut first = [0; 16];
    client.read_exact(&mut first).unwrap();
    let signal = Command::new("kill").args(["-INT", &server.child.id().to_string()]).status().unwrap();
    assert!(signal.success());
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("stopping") && rest.contains("[DONE]"), "{rest}");
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
    let mut said = String::new();
    server.stderr.read_to_string(&mut said).unwrap();
    assert_eq!(said, "");
}
