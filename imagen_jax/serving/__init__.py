"""The browser page: one model, a queue, a gallery."""
