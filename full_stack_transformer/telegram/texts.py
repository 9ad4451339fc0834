"""Every sentence that the bot says of its own accord, in each of its languages; plain text.

Knows neither Telegram nor the service. A test checks that both languages hold the same places.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """One language. Words in braces are filled in."""

    commands: dict[str, str]
    """Command -> its line in the menu."""
    admin_commands: dict[str, str]
    welcome: str
    help: str
    privacy: str

    repeat_button: str
    continue_button: str
    settings_button: str
    stop_button: str
    forget_button: str

    settings_title: str
    settings_topic: str
    fields: dict[str, str]
    presets: tuple[str, str, str]
    modes: tuple[str, str, str]
    random_seed: str
    setting_set: str
    setting_expected: str

    queued: str
    service_away: str
    refused: str
    failed: str
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


ENGLISH = Words(
    commands={
        "start": "What this bot does",
        "help": "How to use it",
        "settings": "Temperature, length, variants, seed, mode",
        "stop": "Stop the text that is being written",
        "reset": "Begin a new conversation",
        "why": "How a text was made, and how to make it again",
        "status": "The model, the line, your tokens of today",
        "privacy": "What is kept about you",
        "export": "Everything that is kept, as a file",
        "forget": "Delete everything that is kept",
    },
    admin_commands={"allow": "Let a user or chat in: /allow ID", "deny": "Shut one out: /deny ID"},
    welcome=(
        "Hello! Send me the beginning of a text and I write how it goes on.\n\n"
        "Your words come back in bold, mine follow them. Repeat writes another continuation of the "
        "same words, Continue goes on from the end. Reply to any of my texts to go on from there.\n\n"
        "/settings changes how I write, /help shows everything."
    ),
    help=(
        "Send me text. I continue it, or answer it where the model was made for conversation.\n\n"
        "Repeat: another sample. Continue: more of the same text. ◀ ▶: the other variants. "
        "Stop ends a text early and keeps what there is. Reply to any of my texts to branch off "
        "from it.\n\n"
        "/settings: temperature, top-k, top-p, repetition penalty, length, variants, seed and mode of "
        "this chat or topic; also typed: /settings temperature 0.5\n"
        "/why: reply with it to a text to see how to make the same text again\n"
        "/stop: end the text that is being written\n"
        "/reset: begin a new conversation\n"
        "/status: the model and your tokens of today\n"
        "/privacy, /export, /forget: what is kept about you, all of it as a file, none of it"
    ),
    privacy=(
        "To answer, repeat, continue and explain texts I keep, on the machine where I run: your user "
        "and chat numbers, your prompts and the texts made from them, your settings, and how many "
        "tokens you used today. Prompts go to the model's service and nowhere else; the log names "
        "sizes, not words{logging}. /export gives you all of it, /forget deletes it. If you block me, "
        "it is deleted too."
    ),
    repeat_button="Repeat",
    continue_button="Continue",
    settings_button="Settings",
    stop_button="Stop",
    forget_button="Yes, delete everything",
    settings_title="Settings of this chat. They hold from the next text on.",
    settings_topic="Settings of this topic. They hold from the next text on.",
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
    setting_set="Set.",
    setting_expected="I expected {expected}",
    queued="You are number {position} in line. Your text comes when it is its turn.",
    service_away="The model is not available right now. I keep your text and answer as soon as it is.",
    refused="The model cannot work with this text, it is probably too long. Please try a shorter one.",
    failed="Something went wrong on my side. Please try again.",
    empty="The model had nothing to say to that.",
    too_many="I am still busy with your earlier messages. Please wait for their answers first.",
    quota="You have used your {quota} tokens of today. There are new ones at midnight UTC.",
    not_allowed="This bot answers only people whom its owner let in. Your number is {user_id}.",
    not_a_text="I can only work with texts. Please send me some words.",
    unknown_command="I do not know this command. /help shows what I can do.",
    stopped="Stopped.",
    nothing_to_stop="There is nothing to stop.",
    reset="A new conversation begins here.",
    why_nothing="Reply with /why to one of my texts.",
    why="Model {model}{checkpoint}\nMode {mode}, seed {seed}, ended by {finish}\n{settings}",
    why_same="The same bytes again:",
    why_chat="The same text again:",
    status="In this chat: {num_waiting} waiting or being written.",
    status_service="The model {model} is ready.",
    status_away="The model is not available right now.",
    status_quota="Your tokens today: {used} of {quota}.",
    status_no_quota="Your tokens today: {used}.",
    status_admin="All chats: {num_jobs} jobs, {num_running} being written. Let in: {allowed}",
    forget_question="Delete your texts, settings and conversations in this chat?",
    forgotten="Deleted. Of this chat I know nothing any more; the count of your tokens stays for a week.",
    export_caption="Everything that I keep about this chat.",
    private_only="Please ask me this in a private chat.",
    admin_usage="Please name a number, such as /{command} 123456789",
    admin_done="Done.",
    alert_foreign="This button belongs to somebody else.",
    alert_outdated="This button no longer works. Please send me your text again.",
    alert_gone="I no longer have this text. Please send it to me again.",
    alert_not_ready="This text is still being written.",
)

RUSSIAN = Words(
    commands={
        "start": "Что умеет этот бот",
        "help": "Как им пользоваться",
        "settings": "Температура, длина, варианты, зерно, режим",
        "stop": "Остановить текст, который пишется",
        "reset": "Начать новый разговор",
        "why": "Как получен текст и как его повторить",
        "status": "Модель, очередь, ваши токены за сегодня",
        "privacy": "Что о вас хранится",
        "export": "Всё, что хранится, одним файлом",
        "forget": "Удалить всё, что хранится",
    },
    admin_commands={
        "allow": "Впустить пользователя или чат: /allow ID",
        "deny": "Закрыть доступ: /deny ID",
    },
    welcome=(
        "Здравствуйте! Пришлите начало текста, и я напишу продолжение.\n\n"
        "Ваши слова вернутся жирным шрифтом, мои — следом. «Ещё раз» пишет другое продолжение тех же "
        "слов, «Дальше» продолжает с конца. Ответьте на любой мой текст, чтобы продолжить с него.\n\n"
        "/settings меняет то, как я пишу, /help показывает всё."
    ),
    help=(
        "Пришлите текст. Я продолжу его или отвечу, если модель создана для разговора.\n\n"
        "«Ещё раз»: другой вариант. «Дальше»: продолжение того же текста. ◀ ▶: другие варианты. "
        "«Стоп» заканчивает текст раньше и оставляет написанное. Ответьте на любой мой текст, чтобы "
        "продолжить с него.\n\n"
        "/settings: температура, top-k, top-p, штраф за повторы, длина, варианты, зерно и режим этого "
        "чата или темы; можно и словами: /settings temperature 0.5\n"
        "/why: ответьте этой командой на текст, чтобы узнать, как получить его снова\n"
        "/stop: остановить текст, который пишется\n"
        "/reset: начать новый разговор\n"
        "/status: модель и ваши токены за сегодня\n"
        "/privacy, /export, /forget: что о вас хранится, всё это файлом, удалить всё"
    ),
    privacy=(
        "Чтобы отвечать, повторять, продолжать и объяснять тексты, я храню на машине, где работаю: "
        "номера пользователя и чата, ваши тексты и то, что из них получилось, ваши настройки и число "
        "токенов за сегодня. Тексты уходят только в службу модели; в журнале размеры, а не "
        "слова{logging}. /export отдаёт всё это, /forget удаляет. Если вы меня заблокируете, всё тоже "
        "удаляется."
    ),
    repeat_button="Ещё раз",
    continue_button="Дальше",
    settings_button="Настройки",
    stop_button="Стоп",
    forget_button="Да, удалить всё",
    settings_title="Настройки этого чата. Действуют со следующего текста.",
    settings_topic="Настройки этой темы. Действуют со следующего текста.",
    fields={
        "temperature": "Температура",
        "top_k": "Top-k",
        "top_p": "Top-p",
        "repetition_penalty": "Штраф за повторы",
        "length": "Длина",
        "variants": "Варианты",
        "seed": "Зерно",
    },
    presets=("Точно", "Обычно", "Смело"),
    modes=("Авто", "Продолжать", "Беседа"),
    random_seed="случайное",
    setting_set="Готово.",
    setting_expected="Я ожидал {expected}",
    queued="Вы {position}-й в очереди. Текст придёт, когда она подойдёт.",
    service_away="Модель сейчас недоступна. Я сохранил ваш текст и отвечу, как только она вернётся.",
    refused="Модель не может работать с этим текстом, вероятно, он слишком длинный. Пришлите покороче.",
    failed="У меня что-то пошло не так. Попробуйте ещё раз.",
    empty="Модели нечего на это сказать.",
    too_many="Я ещё занят вашими прежними сообщениями. Подождите, пожалуйста, ответов на них.",
    quota="Ваши {quota} токенов на сегодня израсходованы. Новые появятся в полночь по UTC.",
    not_allowed="Этот бот отвечает только тем, кого впустил владелец. Ваш номер {user_id}.",
    not_a_text="Я работаю только с текстами. Пришлите, пожалуйста, слова.",
    unknown_command="Я не знаю такой команды. /help покажет, что я умею.",
    stopped="Остановлено.",
    nothing_to_stop="Останавливать нечего.",
    reset="Здесь начинается новый разговор.",
    why_nothing="Ответьте командой /why на один из моих текстов.",
    why="Модель {model}{checkpoint}\nРежим {mode}, зерно {seed}, конец: {finish}\n{settings}",
    why_same="Те же байты ещё раз:",
    why_chat="Тот же текст ещё раз:",
    status="В этом чате ждут или пишутся: {num_waiting}.",
    status_service="Модель {model} готова.",
    status_away="Модель сейчас недоступна.",
    status_quota="Ваши токены за сегодня: {used} из {quota}.",
    status_no_quota="Ваши токены за сегодня: {used}.",
    status_admin="Все чаты: заданий {num_jobs}, пишется {num_running}. Впущены: {allowed}",
    forget_question="Удалить ваши тексты, настройки и разговоры в этом чате?",
    forgotten="Удалено. Об этом чате я больше ничего не знаю; счёт ваших токенов хранится неделю.",
    export_caption="Всё, что я храню об этом чате.",
    private_only="Спросите меня об этом, пожалуйста, в личном чате.",
    admin_usage="Укажите номер, например /{command} 123456789",
    admin_done="Готово.",
    alert_foreign="Эта кнопка принадлежит другому человеку.",
    alert_outdated="Эта кнопка больше не работает. Пришлите текст ещё раз, пожалуйста.",
    alert_gone="У меня больше нет этого текста. Пришлите его ещё раз, пожалуйста.",
    alert_not_ready="Этот текст ещё пишется.",
)

LANGUAGES = {"en": ENGLISH, "ru": RUSSIAN}


def language_of(code: str | None) -> str:
    """The language that a Telegram client names (such as "ru" or "pt-BR"), where there is one."""
    language = (code or "").lower().partition("-")[0]
    return language if language in LANGUAGES else "en"
