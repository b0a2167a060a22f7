"""Conversations: chat templates, tool calls, and what the framework adapters share."""
