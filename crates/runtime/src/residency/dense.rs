//! `dense`: an unquantized checkpoint run as it is, the reference that coded models are measured against.
