//! Running models. The only module of this crate that knows the runtime.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use tersor_cli::{ByteSize, Engine, LimitArgs, Opened, Setup, default_threads};
use tersor_runtime::device::Device;
use tersor_runtime::generate::sampler::Sampling;
use tersor_runtime::generate::session::{Options, Session, Stop, step};
use tersor_runtime::generate::tokenizer::{TextWindow, Tokenizer};
use tersor_runtime::model::llama::LogitsOf;
use tersor_runtime::model::weights::RunError;
use tersor_runtime::residency::{Policy, Strategy};

use crate::errors::{IntoPyErr, OrRaise, from_anyhow};

/// What a model and the streams that run on it share.
struct Shared {
    engine: Mutex<Engine>,
    tokenizer: Option<Tokenizer>,
    directory: PathBuf,
    /// The advice of the model's generation_config.json.
    repetition_penalty: f32,
    vocab: usize,
}

impl Shared {
    /// One caller at a time. A panic in a forward pass leaves nothing half done: caches belong to their sessions.
    fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn tokenizer(&self) -> PyResult<&Tokenizer> {
        match &self.tokenizer {
            Some(tokenizer) => Ok(tokenizer),
            // The error that loading it gave, with its kind.
            None => Err(Tokenizer::load(&self.directory).err().map_or_else(|| PyValueError::new_err("no tokenizer"), IntoPyErr::into_py)),
        }
    }

    /// Token ids of a text, or ids as they are.
    fn tokens(&self, prompt: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
        match prompt.extract::<String>() {
            Ok(text) => self.tokenizer()?.encode(&text).or_raise(),
            Err(_) => prompt.extract().map_err(|_| PyValueError::new_err("a prompt must be a str or a sequence of token ids")),
        }
    }
}

/// A number of bytes, or text such as "2GiB".
#[derive(FromPyObject)]
pub enum Budget {
    Bytes(u64),
    Text(String),
}

/// A model whose weights are held under a strategy. One thread at a time runs it; others wait.
#[pyclass(frozen, module = "tersor")]
pub struct Model {
    shared: Arc<Shared>,
    context: usize,
    bits_per_weight: f64,
    load_seconds: f64,
}

/// How the command is started in a process of its own. The first call counts.
#[pyfunction]
pub fn set_launcher(program_and_arguments: Vec<OsString>) {
    tersor_cli::set_launcher(program_and_arguments);
}

#[pymethods]
impl Model {
    /// Opens a Tersor directory, or an unquantized Hugging Face one, which runs as it is.
    ///
    /// ``memory_budget``: bytes, or text such as ``"2GiB"``; bounds weights, buffers, tables and a KV cache of ``context`` positions, and a
    /// ``MemoryError`` names the least that would do. ``context``: what the model was made for unless given. ``device``: ``cpu``, ``cuda`` or
    /// ``cuda:1`` (NVIDIA). All strategies of a device give the same bits.
    #[staticmethod]
    #[pyo3(signature = (directory, *, strategy = "auto", memory_budget = None, threads = None, context = None, device = "cpu", lru_policy = "pin"))]
    #[allow(clippy::too_many_arguments)] // The options of the command.
    fn open(
        py: Python<'_>,
        directory: PathBuf,
        strategy: &str,
        memory_budget: Option<Budget>,
        threads: Option<usize>,
        context: Option<usize>,
        device: &str,
        lru_policy: &str,
    ) -> PyResult<Self> {
        fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> PyResult<T> {
            text.parse().map_err(|error: T::Err| PyValueError::new_err(error.to_string()))
        }
        let memory_budget = match memory_budget {
            Some(Budget::Bytes(bytes)) => Some(ByteSize(bytes)),
            Some(Budget::Text(text)) => Some(parse(&text)?),
            None => None,
        };
        let limits = LimitArgs { lru_policy: parse::<Policy>(lru_policy)?, memory_budget, level: None, device: parse::<Device>(device)? };
        let strategy = parse::<Strategy>(strategy)?;
        let threads = threads.unwrap_or_else(default_threads);
        if !(1..=1024).contains(&threads) {
            return Err(PyValueError::new_err(format!("threads is {threads}, must be 1 to 1024")));
        }
        let opened = py.detach(move || {
            let setup = Setup::of(strategy, &limits, threads)?;
            let opened = Opened::new(&directory)?;
            let context = opened.context(context, usize::MAX)?;
            let (_, bits_per_weight) = opened.size();
            let repetition_penalty = opened.model.config().repetition_penalty.unwrap_or(1.0);
            let vocab = opened.model.config().vocab;
            let tokenizer = Tokenizer::load(&directory).ok();
            let engine = opened.load(&setup, context, false)?;
            let load_seconds = engine.load_seconds;
            let shared = Shared { engine: Mutex::new(engine), tokenizer, directory, repetition_penalty, vocab };
            anyhow::Ok(Self { shared: Arc::new(shared), context, bits_per_weight, load_seconds })
        });
        opened.map_err(from_anyhow)
    }

    /// Positions: prompt and generated tokens.
    #[getter]
    fn context(&self) -> usize {
        self.context
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.shared.vocab
    }

    /// Of all tensors as stored, everything counted.
    #[getter]
    fn bits_per_weight(&self) -> f64 {
        self.bits_per_weight
    }

    #[getter]
    fn load_seconds(&self) -> f64 {
        self.load_seconds
    }

    #[getter]
    fn strategy(&self, py: Python<'_>) -> String {
        py.detach(|| self.shared.engine().runner.report().strategy)
    }

    #[getter]
    fn strategy_detail(&self, py: Python<'_>) -> String {
        py.detach(|| self.shared.engine().runner.report().detail)
    }

    #[getter]
    fn resident_weight_bytes(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.shared.engine().runner.report().resident_bytes)
    }

    /// Token ids, with the special tokens that the tokenizer adds.
    fn encode(&self, text: &str) -> PyResult<Vec<u32>> {
        self.shared.tokenizer()?.encode(text).or_raise()
    }

    fn decode(&self, tokens: Vec<u32>) -> PyResult<String> {
        Ok(self.shared.tokenizer()?.decode(&tokens))
    }

    /// (tokens, vocab_size): row i scores what follows token i.
    fn logits<'py>(&self, py: Python<'py>, tokens: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let tokens = self.shared.tokens(tokens)?;
        if tokens.len() > self.context {
            return Err(PyValueError::new_err(format!("{} tokens do not fit the context of {}", tokens.len(), self.context)));
        }
        let logits = py.detach(|| {
            let mut logits = Vec::new();
            let mut engine = self.shared.engine();
            let mut kv = engine.runner.new_kv(tokens.len().max(1))?;
            engine.runner.forward(&mut kv, &tokens, LogitsOf::All, &mut logits)?;
            Ok::<_, RunError>(logits)
        });
        PyArray1::from_vec(py, logits.or_raise()?).reshape([tokens.len(), self.shared.vocab])
    }

    /// Continues a text piece by piece; greedy unless ``temperature`` is given. ``repetition_penalty``: what the model's
    /// generation_config.json advises unless given. Equal arguments give equal tokens.
    #[pyo3(signature = (prompt, *, max_tokens = 128, temperature = 0.0, top_k = 0, top_p = 1.0, min_p = 0.0, repetition_penalty = None, seed = 0, ignore_eos = false))]
    #[allow(clippy::too_many_arguments)] // The options of the sampler.
    fn stream(
        &self,
        py: Python<'_>,
        prompt: &Bound<'_, PyAny>,
        max_tokens: usize,
        temperature: f32,
        top_k: usize,
        top_p: f32,
        min_p: f32,
        repetition_penalty: Option<f32>,
        seed: u64,
        ignore_eos: bool,
    ) -> PyResult<Stream> {
        let prompt = self.shared.tokens(prompt)?;
        let repetition_penalty = repetition_penalty.unwrap_or(self.shared.repetition_penalty);
        let options = Options {
            tokens_max: max_tokens,
            context: prompt.len().saturating_add(max_tokens).min(self.context),
            sampling: Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed },
            ignore_eos,
        };
        let session = py.detach(|| Session::new(&*self.shared.engine().runner, &prompt, &options)).or_raise()?;
        let text = self.shared.tokenizer.as_ref().map(|tokenizer| TextWindow::new(tokenizer, &prompt));
        let running = Running { session, text, finished: false };
        Ok(Stream { shared: Arc::clone(&self.shared), running: Mutex::new(running) })
    }

    /// The whole continuation; arguments as for :meth:`stream`.
    // The options are those of `stream`, which checks them; Python is shown them one by one.
    #[pyo3(
        signature = (prompt, **options),
        text_signature = "($self, prompt, *, max_tokens=128, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, \
                          repetition_penalty=None, seed=0, ignore_eos=False)"
    )]
    fn generate(slf: &Bound<'_, Self>, prompt: &Bound<'_, PyAny>, options: Option<&Bound<'_, PyDict>>) -> PyResult<String> {
        let mut text = String::new();
        for piece in slf.call_method("stream", (prompt,), options)?.try_iter()? {
            text += piece?.extract::<&str>()?;
            slf.py().check_signals()?;
        }
        Ok(text)
    }

    fn __repr__(&self) -> String {
        format!("Model({:?}, {:.3} bits per weight, context {})", self.shared.directory, self.bits_per_weight, self.context)
    }
}

/// A sequence on its way, and the text that is known of it.
struct Running {
    session: Session,
    text: Option<TextWindow>,
    /// The end of the text has been given out.
    finished: bool,
}

/// A text on its way: each item is what one token adds to it, empty inside a character.
#[pyclass(frozen, module = "tersor")]
pub struct Stream {
    shared: Arc<Shared>,
    running: Mutex<Running>,
}

impl Stream {
    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Runs the model until there is another token, and returns the text that it settles; `None` at the end.
    fn advance(&self) -> Result<Option<String>, RunError> {
        let mut running = self.running();
        let Running { session, text, finished } = &mut *running;
        let known = session.generated().len();
        while session.stop().is_none() && session.generated().len() == known {
            step(&mut *self.shared.engine().runner, &mut [session])?;
        }
        let tokenizer = self.shared.tokenizer.as_ref();
        let piece = |piece: &mut dyn FnMut(&mut TextWindow, &Tokenizer) -> String| match (text, tokenizer) {
            (Some(text), Some(tokenizer)) => piece(text, tokenizer),
            _ => String::new(),
        };
        if let Some(&token) = session.generated().get(known) {
            return Ok(Some(piece(&mut |text, tokenizer| text.push(tokenizer, token))));
        }
        if *finished {
            return Ok(None);
        }
        *finished = true;
        let rest = piece(&mut |text, tokenizer| text.finish(tokenizer));
        Ok((!rest.is_empty()).then_some(rest))
    }
}

#[pymethods]
impl Stream {
    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<String>> {
        py.detach(|| self.advance()).or_raise()
    }

    /// Generated so far.
    #[getter]
    fn tokens(&self, py: Python<'_>) -> Vec<u32> {
        py.detach(|| self.running().session.generated().to_vec())
    }

    #[getter]
    fn prompt_tokens(&self, py: Python<'_>) -> usize {
        py.detach(|| self.running().session.prompt_tokens())
    }

    /// Why it ended, if it has.
    #[getter]
    fn stop(&self, py: Python<'_>) -> Option<&'static str> {
        py.detach(|| {
            self.running().session.stop().map(|stop| match stop {
                Stop::Eos => "eos",
                Stop::Length => "length",
                Stop::ContextFull => "context",
                Stop::Interrupted => "interrupted",
            })
        })
    }

    /// 64-bit hash, in hex, of the float32 logits of every generated token: equal hashes mean bit-identical runs.
    #[getter]
    fn logits_hash(&self, py: Python<'_>) -> String {
        py.detach(|| format!("{:016x}", self.running().session.logits_hash().expect("the stream's session hashes its logits")))
    }
}
