"""The bot's own texts, in each of its languages; plain text.

Knows neither Telegram nor the service. A test checks that all languages have the same fields.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """The texts of one language; names in braces are filled in."""

    commands: dict[str, str]
    """Command -> its description in the menu."""
    admin_commands: dict[str, str]
    description: str
    """Shown in an empty chat; at most 512 characters."""
    short_description: str
    """Shown in the bot's profile; at most 120 characters."""
    welcome: str
    welcome_chat: str
    """The same of a model that is made for conversation."""
    help: str
    privacy: str
    privacy_logging: str
    """Filled into `privacy` if texts are logged."""

    repeat_button: str
    continue_button: str
    settings_button: str
    stop_button: str
    forget_button: str

    continue_prompt: str
    """What the Continue button says to a model in a conversation."""

    settings_chat: str
    settings_topic: str
    fields: dict[str, str]
    presets: tuple[str, str, str]
    modes: tuple[str, str, str]
    random_seed: str
    auto: str
    """The value of a setting that the model decides."""
    finishes: dict[str, str]
    """How a text ended."""
    setting_set: str
    setting_expected: str

    system_is: str
    system_none: str
    queued: str
    service_away: str
    refused: str
    failed: str
    unreadable: str
    empty: str
    too_many: str
    quota: str
    not_allowed: str
    not_a_text: str
    unknown_command: str

    stopped: str
    nothing_to_stop: str
    reset: str
    why_nothing: str
    why: str
    why_same: str
    why_chat: str
    status: str
    status_service: str
    status_away: str
    status_quota: str
    status_no_quota: str
    status_admin: str
    forget_question: str
    forgotten: str
    export_caption: str
    private_only: str
    admin_usage: str
    admin_done: str

    alert_foreign: str
    alert_outdated: str
    alert_gone: str
    alert_not_ready: str

    def settings_title(self, thread_id: int) -> str:
        """The text above the settings of a chat or topic."""
        return self.settings_topic if thread_id else self.settings_chat

    def number(self, value: float | None) -> str:
        """A number of the settings as text."""
        return self.auto if value is None else f"{value:g}"


ENGLISH = Words(
    commands={
        "start": "What this bot does",
        "help": "How to use it",
        "settings": "Temperature, length, variants, seed, mode",
        "system": "The system prompt of conversations: /system TEXT",
        "model": "Choose the model",
        "stop": "Stop the text that is being written",
        "reset": "Start a new conversation",
        "why": "How a text was generated, and how to get it again",
        "status": "The model, the queue, your tokens today",
        "privacy": "What is stored about you",
        "export": "Download everything that is stored about you",
        "forget": "Delete everything that is stored about you",
    },
    admin_commands={
        "allow": "Allow a user or chat: /allow ID",
        "deny": "Deny a user or chat: /deny ID",
    },
    description=(
        "I am a language model. Send me a message or a text file, and I answer it; a model that is not made "
        "for conversation continues your text.\n\n/help explains everything, /privacy says what is stored."
    ),
    short_description="A language model that answers your messages, or continues your texts.",
    welcome_chat=(
        "Hello! Ask me anything, or send me a text file.\n\n"
        "I remember the conversation; /reset begins a new one. Repeat gives another answer, Continue goes "
        "on. Reply to any of my answers to go back to it.\n\n"
        "/system tells me how to answer, /settings changes how I write, /help explains everything."
    ),
    welcome=(
        "Hello! Send me the beginning of a text, and I will continue it.\n\n"
        "Your text comes back in bold, followed by mine. Repeat writes another continuation, "
        "Continue adds more. Reply to any of my texts to continue from there.\n\n"
        "/settings changes how I write, /help explains everything."
    ),
    help=(
        "Send me a text or a text file. I continue it, or answer it if the model is made for "
        "conversation.\n\n"
        "Repeat: another continuation. Continue: more of the same text. ◀ ▶: the other variants. "
        "Stop: end a text early and keep what there is. Reply to any of my texts to continue from "
        "there. In a group, mention me or reply to me.\n\n"
        "/settings: temperature, top-k, top-p, repetition penalty, length, variants, seed and mode of "
        "this chat or topic; you can also type /settings temperature 0.5\n"
        "/system: how I should answer in a conversation, such as /system Answer in one sentence; /system - "
        "takes it back\n"
        "/model: choose among the models, if there are several\n"
        "/why: reply with it to a text to see how to generate the same text again\n"
        "/stop: stop the text that is being written\n"
        "/reset: start a new conversation\n"
        "/status: the model and your tokens today\n"
        "/privacy, /export, /forget: see, download or delete what is stored about you"
    ),
    privacy=(
        "I store on the machine where I run: your user and chat IDs, your prompts with their text files and "
        "the texts generated from them, your settings, and your number of tokens for each day of the last "
        "week. "
        "I need them to answer, repeat, continue and explain texts. Prompts go only to the model's "
        "service; the log has the lengths of texts, not the texts{logging}. /export gives you all of "
        "it, /forget deletes all of it except the token counts. If you block me, it is deleted, too."
    ),
    privacy_logging=" (for now, the texts as well)",
    repeat_button="Repeat",
    continue_button="Continue",
    settings_button="Settings",
    stop_button="Stop",
    forget_button="Yes, delete everything",
    continue_prompt="Please continue.",
    settings_chat="Settings of this chat, used from the next text on.",
    settings_topic="Settings of this topic, used from the next text on.",
    fields={
        "temperature": "Temperature",
        "top_k": "Top-k",
        "top_p": "Top-p",
        "repetition_penalty": "Repetition penalty",
        "length": "Length",
        "variants": "Variants",
        "seed": "Seed",
    },
    presets=("Precise", "Balanced", "Creative"),
    modes=("Auto", "Continue", "Chat"),
    random_seed="random",
    auto="auto",
    finishes={"stop": "end of the text", "length": "length reached", "stopped": "stopped by you"},
    setting_set="Saved.",
    setting_expected="Possible values: {expected}",
    system_is="System prompt of this chat:\n\n{prompt}",
    system_none="There is no system prompt. Set one with /system TEXT, and take it back with /system -",
    queued="You are number {position} in the queue. Your text comes when it is your turn.",
    service_away="The model is not available right now. I will answer as soon as it is back.",
    refused="The model cannot process this text; it is probably too long. Please try a shorter one.",
    failed="Something went wrong. Please try again.",
    unreadable="I can read text files in UTF-8 of up to 256 KB; this is none.",
    empty="The model returned an empty text.",
    too_many="I am still working on your earlier messages. Please wait for their answers.",
    quota="You have used your {quota} tokens for today. You get new ones at midnight UTC.",
    not_allowed="This bot answers only users whom its owner has allowed. Your ID is {user_id}.",
    not_a_text="I can only work with text. Please send me some words, or a text file.",
    unknown_command="I do not know this command. /help lists what I can do.",
    stopped="Stopped.",
    nothing_to_stop="There is nothing to stop.",
    reset="A new conversation starts here.",
    why_nothing="Reply with /why to one of my texts.",
    why="Model {model}{checkpoint}\nMode {mode}, seed {seed}, {finish}\n{settings}",
    why_same="This generates exactly the same text:",
    why_chat="This generates the same answer:",
    status="In this chat: {num_waiting} waiting or being written.",
    status_service="The model {model} is ready.",
    status_away="The model is not available right now.",
    status_quota="Your tokens today: {used} of {quota}.",
    status_no_quota="Your tokens today: {used}.",
    status_admin="All chats: {num_jobs} pending, {num_running} being written. Allowed: {allowed}",
    forget_question="Delete all your texts here? In a private chat this deletes its settings, too.",
    forgotten="Deleted. I keep only the count of your tokens, for a week.",
    export_caption="Everything that I store about this chat.",
    private_only="Please use this command in a private chat.",
    admin_usage="Please add an ID, such as /{command} 123456789",
    admin_done="Done.",
    alert_foreign="This button belongs to someone else.",
    alert_outdated="This button no longer works. Please send me your text again.",
    alert_gone="I no longer have this text. Please send it again.",
    alert_not_ready="This text is still being written.",
)

RUSSIAN = Words(
    commands={
        "start": "Что умеет этот бот",
        "help": "Как им пользоваться",
        "settings": "Температура, длина, варианты, seed, режим",
        "system": "Указание для разговора: /system ТЕКСТ",
        "model": "Выбрать модель",
        "stop": "Остановить текст, который пишется",
        "reset": "Начать новый разговор",
        "why": "Как получен текст и как его повторить",
        "status": "Модель, очередь, ваши токены за сегодня",
        "privacy": "Что о вас хранится",
        "export": "Скачать всё, что о вас хранится",
        "forget": "Удалить всё, что о вас хранится",
    },
    admin_commands={
        "allow": "Разрешить доступ пользователю или чату: /allow ID",
        "deny": "Запретить доступ пользователю или чату: /deny ID",
    },
    description=(
        "Я языковая модель. Пришлите сообщение или текстовый файл, и я отвечу; модель, которая не "
        "создана для разговора, продолжит ваш текст.\n\n/help объясняет всё, /privacy говорит, что хранится."
    ),
    short_description="Языковая модель, которая отвечает на сообщения или продолжает тексты.",
    welcome_chat=(
        "Здравствуйте! Спросите о чём угодно или пришлите текстовый файл.\n\n"
        "Я помню разговор; /reset начинает новый. «Ещё раз» даёт другой ответ, «Дальше» продолжает. "
        "Ответьте на любой мой ответ, чтобы вернуться к нему.\n\n"
        "/system говорит мне, как отвечать, /settings меняет настройки, /help объясняет всё."
    ),
    welcome=(
        "Здравствуйте! Пришлите начало текста, и я его продолжу.\n\n"
        "Ваш текст вернётся жирным шрифтом, за ним будет мой. «Ещё раз» пишет другое продолжение, "
        "«Дальше» продолжает текст. Ответьте на любой мой текст, чтобы продолжить с этого места.\n\n"
        "/settings меняет настройки, /help объясняет всё."
    ),
    help=(
        "Пришлите текст или текстовый файл. Я продолжу его или отвечу, если модель создана для разговора.\n\n"
        "«Ещё раз»: другое продолжение. «Дальше»: продолжение того же текста. ◀ ▶: другие варианты. "
        "«Стоп»: закончить раньше и оставить написанное. Ответьте на любой мой текст, чтобы "
        "продолжить с этого места. В группе упомяните меня или ответьте на моё сообщение.\n\n"
        "/settings: температура, top-k, top-p, штраф за повторы, длина, варианты, seed и режим этого "
        "чата или темы; можно и написать: /settings temperature 0.5\n"
        "/system: как отвечать в разговоре, например /system Отвечай одним предложением; /system - "
        "отменяет\n"
        "/model: выбрать модель, если их несколько\n"
        "/why: ответьте этой командой на текст, чтобы узнать, как получить его снова\n"
        "/stop: остановить текст, который пишется\n"
        "/reset: начать новый разговор\n"
        "/status: модель и ваши токены за сегодня\n"
        "/privacy, /export, /forget: узнать, скачать или удалить то, что о вас хранится"
    ),
    privacy=(
        "На машине, где я работаю, хранятся: номера пользователя и чата, ваши тексты и файлы и то, что из "
        "них получилось, ваши настройки и число токенов за каждый день последней недели. Это нужно, чтобы "
        "отвечать, повторять, продолжать и объяснять тексты. Тексты уходят только в службу модели; в "
        "журнале есть длина текстов, но не сами тексты{logging}. /export отдаёт всё это, /forget "
        "удаляет всё, кроме счёта токенов. Если вы меня заблокируете, это тоже удаляется."
    ),
    privacy_logging=" (пока и сами тексты)",
    repeat_button="Ещё раз",
    continue_button="Дальше",
    settings_button="Настройки",
    stop_button="Стоп",
    forget_button="Да, удалить всё",
    continue_prompt="Продолжай, пожалуйста.",
    settings_chat="Настройки этого чата. Действуют со следующего текста.",
    settings_topic="Настройки этой темы. Действуют со следующего текста.",
    fields={
        "temperature": "Температура",
        "top_k": "Top-k",
        "top_p": "Top-p",
        "repetition_penalty": "Штраф за повторы",
        "length": "Длина",
        "variants": "Варианты",
        "seed": "Seed",
    },
    presets=("Точно", "Обычно", "Смело"),
    modes=("Авто", "Продолжение", "Беседа"),
    random_seed="случайный",
    auto="авто",
    finishes={"stop": "конец текста", "length": "достигнута длина", "stopped": "остановлено вами"},
    setting_set="Сохранено.",
    setting_expected="Возможные значения: {expected}",
    system_is="Указание для разговора в этом чате:\n\n{prompt}",
    system_none="Указания нет. Задайте его: /system ТЕКСТ, отменить можно так: /system -",
    queued="Вы {position}-й в очереди. Текст придёт, когда она подойдёт.",
    service_away="Модель сейчас недоступна. Я отвечу, как только она вернётся.",
    refused="Модель не может обработать этот текст: наверное, он слишком длинный. Пришлите покороче.",
    failed="Что-то пошло не так. Попробуйте ещё раз.",
    unreadable="Я читаю текстовые файлы в UTF-8 до 256 КБ; это не такой файл.",
    empty="Модель вернула пустой текст.",
    too_many="Я ещё занят вашими прежними сообщениями. Дождитесь, пожалуйста, ответов на них.",
    quota="Вы израсходовали {quota} токенов на сегодня. Новые появятся в полночь по UTC.",
    not_allowed="Этот бот отвечает только тем, кому разрешил владелец. Ваш номер {user_id}.",
    not_a_text="Я работаю только с текстом. Пришлите, пожалуйста, слова или текстовый файл.",
    unknown_command="Я не знаю такой команды. /help покажет, что я умею.",
    stopped="Остановлено.",
    nothing_to_stop="Останавливать нечего.",
    reset="Здесь начинается новый разговор.",
    why_nothing="Ответьте командой /why на один из моих текстов.",
    why="Модель {model}{checkpoint}\nРежим {mode}, seed {seed}, {finish}\n{settings}",
    why_same="Так получится в точности тот же текст:",
    why_chat="Так получится тот же ответ:",
    status="В этом чате ждут или пишутся: {num_waiting}.",
    status_service="Модель {model} готова.",
    status_away="Модель сейчас недоступна.",
    status_quota="Ваши токены за сегодня: {used} из {quota}.",
    status_no_quota="Ваши токены за сегодня: {used}.",
    status_admin="Все чаты: в работе {num_jobs}, пишется {num_running}. Разрешены: {allowed}",
    forget_question="Удалить все ваши тексты здесь? В личном чате удалятся и его настройки.",
    forgotten="Удалено. Остаётся только счёт ваших токенов, на неделю.",
    export_caption="Всё, что я храню об этом чате.",
    private_only="Пожалуйста, используйте эту команду в личном чате.",
    admin_usage="Укажите номер, например /{command} 123456789",
    admin_done="Готово.",
    alert_foreign="Эта кнопка принадлежит другому человеку.",
    alert_outdated="Эта кнопка больше не работает. Пришлите текст ещё раз, пожалуйста.",
    alert_gone="У меня больше нет этого текста. Пришлите его ещё раз, пожалуйста.",
    alert_not_ready="Этот текст ещё пишется.",
)

LANGUAGES = {"en": ENGLISH, "ru": RUSSIAN}


def language_of(code: str | None) -> str:
    """The bot's language for the code of a Telegram client, such as "ru" or "pt-BR"; else English."""
    language = (code or "").lower().partition("-")[0]
    return language if language in LANGUAGES else "en"
