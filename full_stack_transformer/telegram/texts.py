"""Every sentence that the bot says of its own accord; plain text, never a parse mode.

Knows neither Telegram nor the service.
"""

WELCOME = (
    "Hello! Send me the beginning of a text and I write how it goes on.\n\n"
    "Your words come back in bold, mine follow them. The button Repeat below an answer "
    "writes another continuation of the same words."
)
START_COMMAND = "What this bot does"
HELP_COMMAND = "How to use it"

REPEAT_BUTTON = "Repeat"

NOT_A_TEXT = "I can only continue texts. Please send me some words."
SERVICE_AWAY = "The model is not available right now. Please try again in a minute."
REFUSED = "The model cannot continue this text, it is probably too long. Please try a shorter one."
TOO_MANY = "I am still busy with your earlier messages. Please wait for their answers first."
FAILED = "Something went wrong on my side. Please try again."

# Alerts over the chat: 200 characters at most.
# https://core.telegram.org/bots/api#answercallbackquery
PROMPT_GONE = "I can no longer see the text of this answer. Please send it to me again."
OUTDATED_BUTTON = "This button no longer works. Please send me your text again."
