"""JSON schemas as callers send them: of APIs, of tools, of documents, in the notation of schema_notation.

Each can be satisfied in a few hundred bytes.
"""

import re
from typing import Any

from schema_generator import generated
from schema_keywords import KEYWORDS
from schema_notation import schema_of

_APIS = r"""
GitHub issue           {title: str, body?: str, labels: [str]<0..5>, state: "open" | "closed", number: int<1..>}
GitHub repository      {full_name: /^[\w.-]{1,20}\/[\w.-]{1,20}$/, private: bool, stars: int<0..>,
                       license: {spdx: str} | null}
GitHub pull request    {head: str, base: str, draft?: bool, mergeable: bool | null, files: [{path: str,
                       added: int<0..>}]<0..4>}
GitHub review          {event: "APPROVE" | "REQUEST_CHANGES" | "COMMENT", comments: [{path: str, line: int<1..>,
                       body: str}]<0..3>}
GitHub workflow run    {id: int, status: "queued" | "in_progress" | "completed",
                       conclusion: "success" | "failure" | null}
Git commit             {sha: /^[0-9a-f]{7}$/, message: str<1..72>, author: {name: str, email: email},
                       parents: [str]<0..2>}
GitLab pipeline        {ref: str, variables: [{key: /^[A-Z_]{1,12}$/, value: str}]<0..3>}
Stripe charge          {amount: int<1..99999999>, currency: /^[a-z]{3}$/, captured: bool, metadata: {*: str}}
Stripe customer        {email: email, name?: str, address?: {line1: str, city: str, postal_code: str,
                       country: /^[A-Z]{2}$/}}
Stripe subscription    {items: [{price: str, quantity?: int<1..>}]<1..3>, trial_days?: int<0..90>,
                       cancel_at_period_end: bool}
Stripe event           {type: "charge.succeeded" | "charge.failed", livemode: bool, data: {object: {id: str, *: any}}}
PayPal amount          {currency_code: "EUR" | "USD" | "JPY", value: /^\d{1,7}(\.\d{2})?$/}
bank transfer          {iban: /^[A-Z]{2}\d{2}[A-Z0-9]{11,30}$/, amount: num<0.01..10000>, reference?: str<..35>,
                       on: date}
exchange rates         {base: "EUR", date: date, rates: {USD: num<0..>, GBP: num<0..>, CHF?: num<0..>}}
stock quote            {symbol: /^[A-Z]{1,5}$/, price: num<0..>, change: num, volume: int<0..>, at: date-time}
crypto order           {side: "buy" | "sell", pair: /^[A-Z]{3,4}-[A-Z]{3,4}$/, type: "limit" | "market",
                       price?: num<0..>}
weather now            {city: str, temp_c: num<-90..60>, humidity: int<0..100>, wind: {speed: num<0..>,
                       deg: int<0..359>}}
weather forecast       {days: [{date: date, min: num, max: num, rain: num<0..1>,
                       sky: "sun" | "cloud" | "rain"}]<1..3>}
get_weather call       {location: str, unit: "celsius" | "fahrenheit"}
weather alert          {event: str, severity: "minor" | "moderate" | "severe" | "extreme", onset: date-time,
                       areas: [str]<1..3>}
calendar event         {summary: str, start: date-time, end: date-time, attendees: [{email: email,
                       rsvp?: bool}]<0..3>}
recurrence rule        {freq: "DAILY" | "WEEKLY" | "MONTHLY", interval?: int<1..30>, until?: date,
                       byday?: ["MO" | "TU" | "WE"]<1..3>}
free/busy              {calendars: [{id: str, busy: [{from: date-time, to: date-time}]<0..2>}]<1..2>}
meeting room           {name: str, floor: int<-2..40>, seats: int<1..200>,
                       equipment: ["screen" | "phone" | "board"]<0..3>}
reminder               {text: str<1..80>, at: date-time | null, repeat?: duration, done: bool}
SQL select             {table: str, columns: [str]<1..4>, where?: [{column: str, op: "=" | "<" | ">" | "LIKE",
                       value: any}]<0..2>, limit?: int<1..1000>}
SQL insert             {table: /^[a-z_]{1,20}$/, rows: [{*: str | num | bool | null}]<1..2>}
SQL column             {name: str, type: "int" | "text" | "timestamp", nullable: bool, default?: any}
Mongo filter           {age?: {"$gte"?: num, "$lt"?: num}, name?: {"$regex": str}, "$or"?: [{*: any}]<1..2>}
Elasticsearch hit      {_index: str, _id: str, _score: num | null, _source: {*: any}}
Redis command          {cmd: "GET" | "SET" | "DEL", key: str, ttl?: int<1..>}
query plan             @node; node = {op: "scan" | "join" | "sort", rows: int<0..>, cost: num<0..>,
                       children: [@node]<0..2>}
arithmetic tree        @expr; expr = num | {op: "+" | "-" | "*" | "/", left: @expr, right: @expr}
boolean formula        @f; f = bool | {not: @f} | {all: [@f]<1..2>} | {var: /^[a-z]$/}
Python AST             @stmt; stmt = {kind: "assign", name: str, value: @e} | {kind: "return",
                       value: @e}; e = {int: int} | {name: str}
lambda calculus        @t; t = {var: str} | {fun: str, body: @t} | {apply: str, to: @t}
ESTree literal         {type: "Literal", value: str | num | bool | null, raw?: str}
Lisp list              @s; s = str | num | [@s]<0..3>
regular grammar        {rules: [{name: /^[a-z]+$/, alternatives: [[str]<0..3>]<1..2>}]<1..2>}
binary tree            @tree; tree = null | {value: int, left: @tree, right: @tree}
file tree              {name: str, kind: "file" | "dir", children?: [@]<0..2>}
comment thread         {author: str, text: str, replies: [@]<0..2>}
linked list            {head: any, tail: @ | null}
organisation           {name: str, title: str, reports: [@]<0..2>}
menu                   {items: [@entry]<1..3>}; entry = {label: str, href?: uri} | {label: str,
                       submenu: [@entry]<1..2>}
JSON itself            @json; json = null | bool | num | str | [@json]<0..3> | {*: @json}
HTML element           {tag: /^[a-z][a-z0-9]{0,9}$/, attributes?: {*: str}, children: [str | @]<0..2>}
two-coloured tree      @red; red = {red: [@black]<0..2>}; black = {black: [@red]<0..2>}
GeoJSON point          {type: "Point", coordinates: [num]<2..3>}
GeoJSON polygon        {type: "Polygon", coordinates: [[[num]<2..2>]<4..5>]<1..1>}
GeoJSON feature        {type: "Feature", geometry: {type: "Point", coordinates: [num<-180..180>]<2..2>} | null,
                       properties: {*: any} | null}
bounding box           {north: num<-90..90>, south: num<-90..90>, east: num<-180..180>, west: num<-180..180>}
postal address         {street: str, number: str, zip: /^\d{5}(-\d{4})?$/, city: str, country: "DE" | "AT" | "CH"}
route                  {from: str, to: str, mode: "car" | "bike" | "walk", steps: [{text: str,
                       metres: int<0..>}]<1..3>}
flight                 {number: /^[A-Z]{2}\d{1,4}$/, from: /^[A-Z]{3}$/, to: /^[A-Z]{3}$/, departs: date-time,
                       seats: [/^\d{1,2}[A-F]$/]<1..3>}
hotel booking          {hotel: str, check_in: date, nights: int<1..30>, guests: [{name: str, child?: bool}]<1..3>,
                       breakfast: bool}
train connection       {legs: [{line: str, platform?: str, departs: time, arrives: time}]<1..2>,
                       price: num<0..> | null}
package.json           {name: /^[a-z][a-z0-9-]{0,20}$/, version: /^\d+\.\d+\.\d+$/, private?: bool,
                       scripts?: {*: str}, dependencies?: {*: str}}
pyproject              {project: {name: str, version: str, dependencies?: [str]<0..3>},
                       "build-system"?: {requires: [str]<1..2>}}
tsconfig               {compilerOptions: {target: "ES2020" | "ESNext", strict: bool, outDir?: str},
                       include?: [str]<0..2>}
eslint rule            {rules: {semi?: "off" | "warn" | "error", quotes?: 0 | 1 | 2}, env?: {browser?: bool,
                       node?: bool}}
Dockerfile step        {instruction: "FROM" | "RUN" | "COPY" | "ENV", arguments: [str]<1..3>}
compose service        {image: str, ports?: [/^\d{2,5}:\d{2,5}$/]<0..2>, environment?: {*: str},
                       restart?: "no" | "always"}
k8s pod                {apiVersion: "v1", kind: "Pod", metadata: {name: /^[a-z]([a-z0-9-]{0,20}[a-z0-9])?$/,
                       labels?: {*: str}}, spec: {containers: [{name: str, image: str}]<1..2>}}
k8s service            {apiVersion: "v1", kind: "Service", spec: {type?: "ClusterIP" | "NodePort",
                       ports: [{port: int<1..65535>, targetPort?: int | str}]<1..2>}}
k8s resources          {limits?: {cpu?: /^\d{1,4}m?$/, memory?: /^\d{1,4}(Mi|Gi)$/}, requests?: {cpu?: /^\d{1,4}m?$/}}
k8s probe              {httpGet?: {path: str, port: int<1..65535>}, periodSeconds?: int<1..>,
                       failureThreshold?: int<1..>}
Terraform resource     {resource: {type: str, name: str, attributes: {*: any}}, depends_on?: [str]<0..2>}
Ansible task           {name: str, module: "copy" | "shell" | "apt", args: {*: str}, when?: str}
Prometheus alert       {alert: str, expr: str, for?: /^\d+[smh]$/, labels?: {severity: "page" | "ticket"}}
log line               {ts: date-time, level: "DEBUG" | "INFO" | "WARN" | "ERROR", msg: str, fields?: {*: any}}
trace span             {trace_id: /^[0-9a-f]{32}$/, span_id: /^[0-9a-f]{16}$/, parent?: /^[0-9a-f]{16}$/,
                       ms: num<0..>}
HTTP request           {method: "GET" | "POST" | "PUT" | "DELETE", url: uri, headers?: {*: str}, body?: str | null}
HTTP problem           {type: uri, title: str, status: int<400..599>, detail?: str}
JSON-RPC request       {jsonrpc: "2.0", method: str, params?: [any]<0..3> | {*: any}, id: int | str | null}
JSON-RPC error         {jsonrpc: "2.0", error: {code: int<-32768..-32000>, message: str}, id: int | null}
JSON patch             [{op: "remove", path: str} | {op: "add" | "replace", path: str, value: any}]<1..3>
webhook                {id: uuid, event: str, created: date-time, payload: {*: any}, retries: int<0..5>}
OAuth token            {access_token: str<8..40>, token_type: "Bearer", expires_in: int<1..>, scope?: str}
JWT claims             {iss: str, sub: str, exp: int<0..>, aud?: str | [str]<1..2>}
user                   {id: uuid, name: str<1..30>, email: email, roles: ["admin" | "user" | "guest"]<1..3>,
                       last_login?: date-time}
password policy        {min_length: int<8..64>, classes: ["lower" | "upper" | "digit" | "symbol"]<1..4>,
                       expires?: duration}
DNS record             {name: hostname, type: "A", value: ipv4, ttl?: int<60..86400>}
DNS record, v6         {name: hostname, type: "AAAA", value: ipv6, ttl?: int<60..86400>}
firewall rule          {action: "allow" | "deny", source: ipv4 | ipv6, port?: int<0..65535>, protocol: "tcp" | "udp"}
device telemetry       {device: uuid, readings: [{sensor: str, value: num, unit: "C" | "%" | "hPa"}]<1..3>,
                       battery: num<0..1>}
smart home             {room: "kitchen" | "bedroom", device: "lamp" | "heater",
                       action: {on: bool} | {level: int<0..100>}}
invoice                {number: /^INV-\d{4}$/, date: date, lines: [{text: str, quantity: int<1..>,
                       price: num<0..>}]<1..3>, total: num<0..>}
receipt                {shop: str, at: date-time, items: [{name: str, cents: int<0..>}]<1..4>, paid: "cash" | "card"}
purchase order         {id: str, supplier: {name: str, vat?: str}, items: [{sku: /^[A-Z]{2}-\d{4}$/,
                       count: int<1..999>}]<1..3>}
shopping cart          {items: [{sku: str, count: int<1..99>, gift?: bool}]<0..3>, coupon: str | null}
product                {name: str, price: num<0..>, currency: "EUR" | "USD", tags?: [str]<0..4>, stock: int<0..>,
                       dimensions?: {w: num, h: num}}
product review         {stars: 1 | 2 | 3 | 4 | 5, title?: str<..40>, text: str, pros: [str]<0..3>, cons: [str]<0..3>}
shipment               {carrier: "dhl" | "ups", tracking: /^[A-Z0-9]{8,12}$/, events: [{at: date-time,
                       place: str}]<0..2>, delivered: bool}
tax line               {rate: 0 | 0.07 | 0.19, net: num, tax: num}
resume                 {name: str, email?: email, jobs: [{title: str, company: str, from: date,
                       to: date | null}]<0..2>, skills: [str]<0..5>}
job posting            {title: str, remote: bool, salary?: {min: int<0..>, max: int<0..>, currency: str},
                       tags: [str]<1..3>}
contact card           {name: {given: str, family: str}, phones: [{kind: "home" | "work",
                       number: /^\+?[0-9 ]{5,15}$/}]<0..2>}
medical record         {patient: str, born: date, allergies: [str]<0..3>, pressure?: {systolic: int<50..250>,
                       diastolic: int<30..150>}}
prescription           {drug: str, dose_mg: num<0..5000>, times: ["morning" | "noon" | "night"]<1..3>,
                       days: int<1..90>}
lab result             {test: str, value: num, unit: str, range?: {low: num, high: num}, flag: "L" | "N" | "H" | null}
named entities         {entities: [{text: str, label: "PERSON" | "ORG" | "PLACE", start: int<0..>,
                       end: int<0..>}]<0..3>}
sentiment              {label: "positive" | "neutral" | "negative", score: num<0..1>}
classification         {category: "billing" | "bug" | "feature" | "other", confidence: num<0..1>, why?: str}
translation            {source: /^[a-z]{2}$/, target: /^[a-z]{2}$/, text: str}
summary                {title: str, bullets: [str<1..60>]<1..4>, keywords?: [str]<0..5>}
question and answer    {question: str, choices: [str]<2..4>, answer: int<0..3>, explanation?: str}
chain of thought       {steps: [{explanation: str, output: str}]<1..3>, final_answer: str}
grading                {score: int<0..10>, rubric: [{criterion: str, met: bool}]<1..3>, comment: str}
fact check             {claim: str, verdict: "true" | "false" | "unclear", sources: [uri]<0..2>}
moderation             {flagged: bool, categories: {hate: bool, violence: bool, "self-harm": bool}}
knowledge triple       [{subject: str, relation: str, object: str}]<1..3>
recipe                 {title: str, serves: int<1..12>, ingredients: [{name: str, amount: num<0..>,
                       unit?: "g" | "ml"}]<1..4>, steps: [str]<1..4>}
movie                  {title: str, year: int<1888..2100>, genres: [str]<0..3>, rating: num<0..10> | null}
playlist               {name: str, tracks: [{artist: str, title: str, seconds: int<1..>}]<0..3>, public: bool}
chess move             {from: /^[a-h][1-8]$/, to: /^[a-h][1-8]$/, promotes?: "q" | "r" | "b" | "n"}
game character         {name: str, class: "mage" | "rogue", stats: {str: int<1..20>, dex: int<1..20>},
                       inventory: [str]<0..4>}
sudoku row             [int<1..9>]<9..9>
tic-tac-toe            [["X" | "O" | null]<3..3>]<3..3>
colour                 /^#[0-9a-fA-F]{6}$/
semantic version       /^(0|[1-9]\d{0,3})\.(0|[1-9]\d{0,3})\.(0|[1-9]\d{0,3})$/
chart                  {kind: "bar" | "line", series: [{name: str, points: [num]<1..4>}]<1..2>, title?: str}
UI component           {type: "div" | "button", label: str, children: [@]<0..2>, attributes: [{name: str,
                       value: str}]<0..2>}
form field             {name: /^[a-z_]{1,16}$/, kind: "text", max?: int<1..>} | {name: /^[a-z_]{1,16}$/,
                       kind: "choice", options: [str]<1..3>}
spreadsheet cell       {ref: /^[A-Z]{1,2}[1-9]\d{0,3}$/, value: str | num | bool | null, formula?: str}
email draft            {to: [email]<1..2>, cc?: [email]<0..2>, subject: str, body: str, attachments?: [{name: str,
                       bytes: int<0..>}]<0..2>}
send_message tool      {channel: /^[#@][a-z0-9-]{1,20}$/, text: str<1..200>, thread?: str}
web search tool        {query: str<1..80>, top_k?: int<1..10>, site?: hostname, after?: date}
run_python tool        {code: str, timeout?: num<0..60>}
read_file tool         {path: str<1..80>, offset?: int<0..>, limit?: int<1..2000>}
edit_file tool         {path: str, edits: [{old: str, new: str}]<1..2>, dry_run?: bool}
shell tool             {command: [str]<1..4>, cwd?: str, env?: {*: str}}
browser action         {action: "goto", url: uri} | {action: "click", x: int<0..>, y: int<0..>} | {action: "type",
                       text: str}
MCP initialize         {protocolVersion: date, capabilities: {sampling?: {*: any}, roots?: {listChanged?: bool}},
                       clientInfo: {name: str, version: str}}
MCP content            [{type: "text", text: str} | {type: "image", data: str, mimeType: /^image\/(png|jpeg)$/}]<1..2>
MCP tool result        {content: [{type: "text", text: str}]<0..2>, isError?: bool, structuredContent?: {*: any}}
tool call or answer    {thought: str, tool: {name: "search", arguments: {q: str}} | {name: "finish",
                       arguments: {answer: str}}}
agent plan             {goal: str, tasks: [{id: int<1..>, after: [int]<0..2>,
                       state: "todo" | "doing" | "done"}]<1..3>}
OpenAI message         {role: "user" | "assistant", content: str | [{type: "text", text: str}]<1..2>}
embedding request      {input: str | [str]<1..3>, model: str, dimensions?: int<1..4096>}
"""


def _table(text: str) -> dict[str, dict[str, Any]]:
    """Name → schema, with two spaces or more between them. A line that begins with a space continues the one before."""
    rows = (line.split("  ", 1) for line in re.sub(r"\n +", " ", text.strip()).splitlines())
    return {name: schema_of(notation) for name, notation in rows}


CORPUS: dict[str, dict[str, Any]] = {**_table(_APIS), **KEYWORDS, **generated(100)}
