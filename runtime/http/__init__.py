"""Bounded HTTP/1.1 serving of ASGI apps, on httptools."""
