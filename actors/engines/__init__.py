"""The engine protocol and its two implementations, torch and vLLM."""
