"""Conversations: messages, chat templates, and the tokens that the loss is computed on."""
