//! The calculator of examples/python/calculator.py in Rust: a pool program that keeps a stack for one
//! connection.
//!
//! It needs no library of preforkd: calls and answers are frames on descriptor 3. Build it with `cargo build
//! --example calculator`, and name `target/debug/examples/calculator` as the command in
//! examples/python/calculator.toml.

#![allow(unsafe_code)]

use std::io::{self, Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

/// Reads a frame; `None` at the end of the connection.
fn read_frame(calls: &mut UnixStream) -> io::Result<Option<Value>> {
    let mut length = [0; 4];
    match calls.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    let mut body = vec![0; u32::from_le_bytes(length) as usize];
    calls.read_exact(&mut body)?;
    Ok(Some(serde_json::from_slice(&body)?))
}

fn write_frame(calls: &mut UnixStream, answer: &Value) -> io::Result<()> {
    let body = answer.to_string();
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let mut frame = length.to_le_bytes().to_vec();
    frame.extend_from_slice(body.as_bytes());
    calls.write_all(&frame)
}

/// Takes numbers and operators in postfix order. Returns the changed stack, or what is wrong.
fn enter(stack: &[f64], items: &[Value]) -> Result<Vec<f64>, String> {
    let mut changed = stack.to_vec();
    for item in items {
        if let Some(number) = item.as_f64() {
            changed.push(number);
            continue;
        }
        let (Some(right), Some(left)) = (changed.pop(), changed.pop()) else {
            return Err(format!("{item} needs two numbers"));
        };
        changed.push(match item.as_str() {
            Some("+") => left + right,
            Some("-") => left - right,
            Some("*") => left * right,
            Some("/") if right == 0.0 => return Err("a division by zero".to_owned()),
            Some("/") => left / right,
            _ => return Err(format!("enter numbers and + - * /, not {item}")),
        });
    }
    Ok(changed)
}

fn main() -> io::Result<()> {
    // SAFETY: preforkd has opened descriptor 3 for this program, and nothing else uses it.
    let mut calls = unsafe { UnixStream::from_raw_fd(3) };
    write_frame(&mut calls, &json!({"out": "ready"}))?;
    let mut stack = Vec::new();
    while let Some(call) = read_frame(&mut calls)? {
        let items = match &call["params"] {
            Value::Array(items) => items.clone(),
            Value::Null => Vec::new(),
            item => vec![item.clone()],
        };
        let answer = match enter(&stack, &items) {
            Ok(changed) => {
                stack = changed;
                json!({"out": call["in"], "result": stack})
            }
            Err(message) => json!({"out": "error", "result": {"code": 1, "message": message}}),
        };
        write_frame(&mut calls, &answer)?;
    }
    Ok(())
}
